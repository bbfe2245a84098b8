from __future__ import annotations

import copy
from functools import cache
from itertools import pairwise

import pytest
import torch
import transformers
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from trl.trainer.utils import add_fused_lm_head

import adsc
from adsc.errors import InputError
from adsc.pocket import MODEL_FOLDER
from adsc.pocket.building import CHAT_TEMPLATE, build_tokenizer
from adsc.training.collating import Collator, align, segment_mask
from adsc.training.data import PocketQuestions

SCHEDULE = "4:1/2,9:1/3,16:1/2"
# As the processors of these families have them on the hub.
CHATML = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VICUNA = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
GEMMA = (
    "<bos>{% for message in messages %}<start_of_turn>{{ 'model' if message['role'] == 'assistant' else 'user' }}\n"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<start_of_image>"
    "{% else %}{{ part['text'] | trim }}{% endif %}{% endfor %}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
IDEFICS = (
    "<s>{% for message in messages %}{{ message['role'] | capitalize }}:{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %} {{ part['text'] }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)


def tokenizer(special: list[str], bos: bool = False, **fields) -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE of some words that merges line ends; with ``bos`` it adds the token to every text."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    text = ["what is this? a red circle.\n\n\n\n is it round? yes, it is.\n\n"] * 9
    made.train_from_iterator(
        text,
        trainers.BpeTrainer(
            vocab_size=380,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    made.add_special_tokens([AddedToken(token, special=True) for token in special])
    if bos:
        from tokenizers.processors import TemplateProcessing

        made.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", made.token_to_id("<s>"))])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **fields)


class ImagesOnly(transformers.Qwen2_5_VLProcessor):
    """Without the part for videos, which wants torchvision."""

    def check_argument_for_proper_class(self, name, argument):
        return type(None) if name == "video_processor" else super().check_argument_for_proper_class(name, argument)


def pocket():
    return transformers.AutoProcessor.from_pretrained(MODEL_FOLDER), transformers.AutoConfig.from_pretrained(
        MODEL_FOLDER
    )


def llava_next():
    size, pinpoints = {"height": 16, "width": 16}, [[16, 32], [32, 16], [32, 32]]
    images = transformers.LlavaNextImageProcessorPil(
        size={"shortest_edge": 16}, crop_size=size, image_grid_pinpoints=pinpoints
    )
    processor = transformers.LlavaNextProcessor(
        images,
        build_tokenizer(),
        patch_size=4,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        image_token="<image>",
        num_additional_image_tokens=1,
    )
    return processor, transformers.LlavaNextConfig(
        image_token_id=processor.image_token_id, image_grid_pinpoints=pinpoints
    )


def llava_1_5():
    words = tokenizer(
        ["<pad>", "<s>", "</s>", "<image>"], bos=True, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        extra_special_tokens=["<image>"],
    )  # fmt: skip
    images = transformers.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor = transformers.LlavaProcessor(
        images, words, patch_size=4, vision_feature_select_strategy="default", chat_template=VICUNA,
        image_token="<image>", num_additional_image_tokens=1,
    )  # fmt: skip
    return processor, transformers.LlavaConfig(image_token_id=processor.image_token_id)


def qwen2_5_vl():
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
    words = tokenizer([*special, "<|video_pad|>"], pad_token="<|endoftext|>", eos_token="<|im_end|>")
    images = transformers.Qwen2VLImageProcessorPil(
        patch_size=2, merge_size=2, temporal_patch_size=2, min_pixels=16, max_pixels=512
    )
    processor = ImagesOnly(images, words, None, chat_template=CHATML)
    ids = {f"{kind}_token_id": words.convert_tokens_to_ids(f"<|{kind}_pad|>") for kind in ("image", "video")}
    return processor, transformers.Qwen2_5_VLConfig(**ids)


def gemma3():
    named = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    special = ["<pad>", "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>", *named.values()]
    words = tokenizer(special, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", extra_special_tokens=named)
    images = transformers.Gemma3ImageProcessorPil(size={"height": 8, "width": 8})
    processor = transformers.Gemma3Processor(images, words, chat_template=GEMMA, image_seq_length=4)
    return processor, transformers.Gemma3Config(image_token_id=words.convert_tokens_to_ids("<image_soft_token>"))


def idefics3():
    marks = ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>"]
    marks += [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]
    words = tokenizer(["<pad>", "<s>", "</s>", *marks], pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    images = transformers.Idefics3ImageProcessorPil(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
    processor = transformers.Idefics3Processor(images, words, image_seq_len=4, chat_template=IDEFICS)
    return processor, transformers.Idefics3Config(image_token_id=words.convert_tokens_to_ids("<image>"))


PROCESSORS = {made.__name__: made for made in (pocket, llava_next, llava_1_5, qwen2_5_vl, gemma3, idefics3)}


@cache
def processor_and_config(name: str):
    return PROCESSORS[name]()


def text(said: str) -> dict:
    return {"type": "text", "text": said}


IMAGE = {"type": "image"}


def talk(*turns: str | list) -> list[dict]:
    roles = ("user", "assistant")
    return [
        {"role": roles[i % 2], "content": turn if isinstance(turn, list) else [text(turn)]}
        for i, turn in enumerate(turns)
    ]


def rows() -> list[dict]:
    """One image, two images in two turns, and none."""
    one, other = Image.new("RGB", (30, 20), "red"), Image.new("RGB", (20, 34), "blue")
    return [
        {"messages": talk([IMAGE, text("what is this?")], "a red circle."), "images": [one]},
        {
            "messages": talk([IMAGE, text("what is this?")], "a circle.", [IMAGE, text("is it round?")], "yes, it is."),
            "images": [other, one],
        },
        {"messages": talk("is it round?", "yes."), "images": []},
    ]


def learned(processor, row: dict) -> list[tuple[int, int]]:
    """``(position, token)`` of the answers: what the processor adds to the prompt, with its images, for each turn."""
    found = []
    for turn in range(1, len(row["messages"]), 2):
        texts = [
            processor.apply_chat_template(row["messages"][:turn], tokenize=False, add_generation_prompt=True),
            processor.apply_chat_template(row["messages"][: turn + 1], tokenize=False).rstrip(),
        ]
        ends = turn + 1 == len(row["messages"]) and not texts[1].endswith(tuple(processor.tokenizer.get_added_vocab()))
        texts[1] += processor.tokenizer.eos_token if ends else ""
        images = row["images"][: sum(part["type"] == "image" for m in row["messages"][:turn] for part in m["content"])]
        prompt, whole = (processor(images=[images] if images else None, text=[each])["input_ids"][0] for each in texts)
        assert whole[: len(prompt)] == prompt
        found += list(enumerate(whole))[len(prompt) :]
    return found


def labelled(batch, row: int) -> list[tuple[int, int]]:
    places = (batch["labels"][row] != -100).nonzero().flatten().tolist()
    return [(place, int(batch["labels"][row, place])) for place in places]


@pytest.mark.parametrize("name", PROCESSORS)
def test_labels_are_the_answers(name):
    processor, config = processor_and_config(name)
    batch = Collator(processor, config=config)(rows())
    for number, row in enumerate(rows()):
        expected = learned(processor, row)
        assert len(expected) >= 2
        assert labelled(batch, number) == expected
    assert torch.equal(batch["attention_mask"].bool(), batch["input_ids"] != processor.tokenizer.pad_token_id)


@pytest.mark.parametrize("name", PROCESSORS)
def test_prompts_are_those_of_inference(name):
    processor, config = processor_and_config(name)
    row = rows()[1]
    batch = Collator(processor, config=config)([row])
    images = iter(row["images"])
    prompt = [
        m | {"content": [p | {"image": next(images)} if p["type"] == "image" else p for p in m["content"]]}
        for m in row["messages"][:3]
    ]
    asked = processor.apply_chat_template(
        prompt, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    length = asked["input_ids"].shape[1]
    assert torch.equal(batch["input_ids"][:, :length], asked["input_ids"])
    assert torch.equal(batch["pixel_values"], asked["pixel_values"])
    _, last = labelled(batch, 0)[-1]
    ends = {"gemma3": "<end_of_turn>", "idefics3": "<end_of_utterance>"}
    assert processor.tokenizer.convert_ids_to_tokens(last) == ends.get(name, processor.tokenizer.eos_token)


@pytest.mark.parametrize("name", PROCESSORS)
def test_all_text_without_what_stands_for_images(name):
    processor, config = processor_and_config(name)
    collator = Collator(processor, config=config, answers_only=False)
    batch = collator(rows())
    for number, row in enumerate(rows()):
        written, _ = collator.write(row["messages"])
        short = processor.tokenizer(written, add_special_tokens=False)["input_ids"]
        marks = {i for i, token in enumerate(short) if token in collator._marks()}
        expected = [token for i, token in enumerate(short) if i not in marks]
        got = [token for _, token in labelled(batch, number)]
        if name == "gemma3":  # line ends beside an image are merged with those around it
            assert len(expected) - len(got) <= 2 * len(marks)
            assert set(got) <= set(expected)
        else:
            assert got == expected
        assert set(learned(processor, row)) <= set(labelled(batch, number))


def test_plain_strings_are_read_as_trl_reads_them():
    processor, config = processor_and_config("qwen2_5_vl")
    collator, (row, *_) = Collator(processor, config=config), rows()
    plain = [message | {"content": message["content"][-1]["text"]} for message in row["messages"]]
    batch, expected = collator([row | {"messages": plain}]), collator([row])
    assert plain[0]["content"] == "what is this?"  # the caller's rows are not written to
    assert all(torch.equal(batch[name], value) for name, value in expected.items())


def test_the_label_after_an_image_goes_with_its_last_token():
    processor, config = processor_and_config("llava_next")
    whole = Collator(processor, config=config, answers_only=False)(rows())
    careless = Collator(processor, config=config, answers_only=False, keeps_last_token=False)(rows())
    changed = (whole["labels"] != careless["labels"]).nonzero().tolist()
    ids, image = whole["input_ids"], config.image_token_id
    ends = [
        [row, i]
        for row in range(len(ids))
        for i in range(1, ids.shape[1])
        if ids[row, i - 1] == image and ids[row, i] != image
    ]
    assert len(ends) == 3
    assert changed == ends
    assert (careless["labels"][tuple(zip(*ends, strict=True))] == -100).all()


@cache
def pocket_model():
    return transformers.AutoModelForImageTextToText.from_pretrained(MODEL_FOLDER).eval()


def model():
    return copy.deepcopy(pocket_model())


def test_loss_is_the_cross_entropy_of_the_answers():
    processor, config = processor_and_config("pocket")
    given = [PocketQuestions("train", 3)[0], *rows()]
    batch = Collator(processor, config=config)(given)
    unlabelled = {name: value for name, value in batch.items() if name != "labels"}
    network = model()
    with torch.no_grad(), adsc.compress(network, SCHEDULE):
        loss, logits = network(**batch).loss, network(**unlabelled).logits
    chances = [
        logits[number, place - 1].log_softmax(-1)[token]
        for number, row in enumerate(given)
        for place, token in learned(processor, row)
    ]
    assert len(chances) > 10
    assert abs(loss + torch.stack(chances).mean()) <= 1e-5


class Careless(adsc.methods.ADSC):
    keeps_last_token = False


@pytest.mark.parametrize("method", [adsc.methods.ADSC, Careless])
@pytest.mark.parametrize("answers_only", [True, False])
def test_the_fused_head_has_the_same_loss(method, answers_only):
    processor, config = processor_and_config("pocket")

    def losses(keeps_last_token: bool) -> tuple[float, float]:
        batch = Collator(processor, config=config, answers_only=answers_only, keeps_last_token=keeps_last_token)(rows())
        network = model()
        with torch.no_grad(), adsc.compress(network, method(SCHEDULE)):
            add_fused_lm_head(network)
            return float(network(**batch).loss), float(network(**batch, fused_lm_head=True).loss)

    plain, fused = losses(method.keeps_last_token)
    assert abs(plain - fused) <= 1e-5
    if not (answers_only or method.keeps_last_token):  # only the engine would know
        plain, fused = losses(True)
        assert abs(plain - fused) >= 1e-3


def test_refusals():
    processor, config = processor_and_config("pocket")
    with pytest.raises(InputError, match="max_length 100 would cut images apart"):
        Collator(processor, config=config, max_length=100)
    hiding = copy.copy(processor)
    hiding.chat_template = CHAT_TEMPLATE.replace("{{ part['text'] }}", "{{ part['text'] | upper }}")
    with pytest.raises(InputError, match="hides the answer 'a red circle"):
        Collator(hiding, config=config)(rows())


class Rewriting(transformers.LlavaProcessor):
    def __call__(self, images=None, text=None, **options):
        return super().__call__(images=images, text=[each.replace("circle", "ring") for each in text], **options)


def test_answers_that_the_processor_rewrites_are_refused():
    processor, config = processor_and_config("pocket")
    made = Rewriting(**{name: getattr(processor, name) for name in ("image_processor", "tokenizer", "chat_template")})
    made.patch_size, made.num_additional_image_tokens = processor.patch_size, 1
    made.vision_feature_select_strategy = "default"
    with pytest.raises(InputError, match="Rewriting rewrites the text around an answer"):
        Collator(made, config=config)(rows()[:1])


def test_align():
    assert align([1, 9, 2, 3], [1, 9, 9, 9, 2, 3], {9}) == [0, None, 4, 5]
    assert align([1, 9, 9, 2], [1, 8, 7, 8, 7, 2], {9}) == [0, None, None, 5]
    assert align([9, 5, 2, 9, 2, 6], [9, 5, 5, 5, 2, 9, 9, 2, 6], {9}) == [None, 3, 4, None, 7, 8]
    assert align([1, 2, 3], [1, 2, 3], {9}) == [0, 1, 2]
    # Tokens of the text stand among those of the image too.
    assert align([1, 9, 2], [1, 9, 2, 9, 2], {9}) == [0, None, 4]
    assert align([9, 7, 9, 3], [7, 7, 9, 3], {9}) == [None, 1, None, 3]
    # The token beside the image was merged with what the image begins with.
    assert align([1, 4, 9, 4, 2, 3], [1, 44, 9, 9, 44, 2, 3], {9}) == [0, None, None, None, 5, 6]
    found = [place for place in align([1, 2, 9, 3, 9, 4], [1, 2, 9, 9, 3, 9, 9, 4], {9}) if place is not None]
    assert all(a < b for a, b in pairwise(found))


# Independent turns


@pytest.mark.parametrize("name", ["pocket", "llava_next", "llava_1_5", "idefics3"])
@pytest.mark.parametrize("images", [1, 2])
def test_an_independent_turn_has_the_tokens_labels_and_positions_it_has_alone(name, images):
    processor, config = processor_and_config(name)
    pictures = [Image.new("RGB", (30, 20), "red"), Image.new("RGB", (20, 34), "blue")][:images]
    asked = [("what is this?", "a red circle."), ("is it round?", "yes, it is."), ("what?", "a circle.")]
    merged = talk(*(said for pair in asked for said in pair))
    merged[0]["content"] = [IMAGE] * images + merged[0]["content"]
    single = {"messages": talk([IMAGE] * images + [text(asked[0][0])], asked[0][1]), "images": pictures}
    collate = Collator(processor, config=config, independent_turns=True)
    batch = collate([{"messages": merged, "images": pictures}, single])
    plain = Collator(processor, config=config)
    segments = batch["segments"][0]
    mask = segment_mask(batch["segments"], torch.float32)
    for number, (question, answer) in enumerate(asked, start=1):
        row = {"messages": talk([IMAGE] * images + [text(question)], answer), "images": pictures}
        alone = plain([row])
        seen = (segments == 0) | (segments == number)
        for key in ("input_ids", "labels"):
            assert batch[key][0, seen].tolist() == alone[key][0].tolist()
        assert batch["position_ids"][0, seen].tolist() == list(range(alone["input_ids"].shape[1]))
        last = seen.nonzero()[-1, 0]
        assert torch.equal(mask[0, 0, last] == 0, seen)
    assert (batch["attention_mask"] == (batch["segments"] >= 0)).all()
    assert batch["attention_mask"][1].sum() == plain([single])["input_ids"].shape[1]
    assert set(batch["segments"][1].tolist()) == {0, 1, -1}
    assert (batch["labels"][batch["segments"] == -1] == -100).all()


def test_a_conversation_with_images_further_on_stays_whole():
    processor, config = processor_and_config("pocket")
    collate = Collator(processor, config=config, independent_turns=True)
    batch = collate(rows()[1:2])
    assert set(batch["segments"][0].tolist()) == {0, 1}
    plain = Collator(processor, config=config)(rows()[1:2])
    for key in ("input_ids", "labels"):
        assert torch.equal(batch[key], plain[key])


@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3"])
def test_independent_turns_are_refused_where_the_model_wants_more_than_a_mask(name):
    processor, config = processor_and_config(name)
    with pytest.raises(InputError, match=f"which {config.model_type} does not have; set it to false"):
        Collator(processor, config=config, independent_turns=True)
