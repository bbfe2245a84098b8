"""Pictures and pages of what a reduction did."""
