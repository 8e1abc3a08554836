"""A vision-language model through TRL's own collator: images in both passes."""

import random

import pytest
import torch
from datasets import Dataset
from test_trl import assert_follows
from toy_trl import WORDS, build, tokenizer
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from hf_sam import with_sam

Image = pytest.importorskip("PIL.Image")

CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {% for c in m.content %}{% if c.type == 'image' %}<image> "
    "{% else %}{{ c.text }} {% endif %}{% endfor %}{% endfor %}"
)


def processor() -> LlavaProcessor:
    words = tokenizer()
    words.add_tokens(["<image>"], special_tokens=True)
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return LlavaProcessor(
        image_processor=images,
        tokenizer=words,
        patch_size=8,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def llava(words) -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    size = {"intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = CLIPVisionConfig(hidden_size=16, image_size=16, patch_size=8, projection_dim=16, **size)
    text = LlamaConfig(vocab_size=len(words), hidden_size=32, num_key_value_heads=2, pad_token_id=0, **size)
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_id=words.convert_tokens_to_ids("<image>"),
            image_seq_length=5,
            vision_feature_select_strategy="full",
            vision_feature_layer=-1,
        )
    )


def conversations(count: int = 32) -> Dataset:
    generator = random.Random(0)

    def row():
        colour = tuple(generator.randrange(255) for _ in range(3))
        question = [{"type": "image", "text": None}, {"type": "text", "text": "w1 w2"}]
        answer = [{"type": "text", "text": generator.choice(WORDS)}]
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return {"images": [Image.new("RGB", (16, 16), colour)], "messages": messages}

    return Dataset.from_list([row() for _ in range(count)])


def test_images_pass_through_the_hosts_collator_in_both_passes(tmp_path):
    def run(wrap=lambda cls: cls, **sam):
        processing_class = processor()
        return build(
            "sft",
            tmp_path,
            wrap,
            model=llava(processing_class.tokenizer),
            processing_class=processing_class,
            data=conversations(),
            max_length=None,
            gradient_checkpointing=False,
            per_device_train_batch_size=2,
            **sam,
        )

    sam, host = run(with_sam, sam_rho=0.05), run()
    assert type(sam.data_collator) is DataCollatorForVisionLanguageModeling
    assert_follows(sam, host)
