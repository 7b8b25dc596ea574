"""The vision miniature: a vision tower and a projector for the maths expert.

Tower and projector are trained to turn a picture into the token embeddings of the story that it shows, by regression
without a language model. The maths expert's weights do not change, so its task vector is the same as in the text model,
and every model of the family understands the tower's output. (A tower that is trained through a frozen model drifts to
embeddings that only this model understands, and no merge of it.)
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random

import numpy as np
import torch
from miniature_problems import Language
from picture_problems import PATCH, SIDE, TOKENS, Scene, draw_scene, picture
from torch import Tensor
from torch.nn import functional
from transformers import (
    CLIPVisionConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

IMAGE_TOKEN = "<image>"

PICTURES = 12_000
"""Pictures to train on, drawn once; their parts are independent, so more pictures would not help."""

STEPS, BATCH, RATE = 6000, 48, 1e-3
ENOUGH = 0.99
"""The rate decays, and training ends, when this share of stories is read without a wrong token."""

DECAY = 600


def processor_of(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """A processor for pictures in their drawn size, with one more token, which stands for a picture."""
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False)
    size = {"height": SIDE, "width": SIDE}
    images = CLIPImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=1,
    )


def new_vision_model(language: LlamaForCausalLM, processor: LlavaProcessor) -> LlavaForConditionalGeneration:
    """A LLaVA of 1.8 M parameters around a language model, whose weights are copied."""
    text = language.config
    vision = CLIPVisionConfig(
        hidden_size=96, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4, image_size=SIDE,
        patch_size=PATCH, projection_dim=96,
    )  # fmt: skip
    own = text.to_dict() | {"vocab_size": text.vocab_size + 1, "_name_or_path": ""}  # no path of this machine
    config = LlavaConfig(
        vision_config=vision,
        text_config=type(text).from_dict(own),
        image_token_index=processor.image_token_id,
        image_seq_length=TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
        pad_token_id=text.pad_token_id,
        bos_token_id=text.bos_token_id,
        eos_token_id=text.eos_token_id,
    )
    model = LlavaForConditionalGeneration(config)
    set_language(model, language.state_dict())
    model.generation_config = language.generation_config
    return model


def set_language(model: LlavaForConditionalGeneration, weights: Mapping[str, Tensor]) -> None:
    """Give a LLaVA the weights of a plain language model. The picture's token gets the mean of all rows, which is never
    the most likely token."""
    own = {name.removeprefix("model."): tensor for name, tensor in weights.items() if name != "lm_head.weight"}
    table = own["embed_tokens.weight"]
    own["embed_tokens.weight"] = torch.cat([table, table.mean(0, keepdim=True)])
    model.model.language_model.load_state_dict(own)


class Reading:
    """Training data of a tower: pictures with the embeddings of their stories.

    Args:
        count: how many pictures to draw, about sums of the training split; batches are sampled from these.
    """

    def __init__(self, table: Tensor, processor: LlavaProcessor, count: int, seed: str) -> None:
        random = Random(seed)
        self._table, self._processor = table, processor
        scenes = [draw_scene(random, "train") for _ in range(count)]
        self._tokens = torch.tensor([self.tokens(scene) for scene in scenes])
        self._pictures = torch.from_numpy(np.stack([np.asarray(picture(scene)) for scene in scenes]))

    def __len__(self) -> int:
        return len(self._tokens)

    def batch(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels, float32 [rows, 3, SIDE, SIDE], and the tokens of the stories, int64 [rows, TOKENS]."""
        pixels = self._pictures[numbers].permute(0, 3, 1, 2) / 127.5 - 1  # as the processor has it, and quicker
        return pixels, self._tokens[numbers]

    def tokens(self, scene: Scene) -> list[int]:
        tokens: list[int] = self._processor.tokenizer.encode(scene.story, add_special_tokens=False)
        if len(tokens) != TOKENS:
            raise ValueError(f"the story {scene.story!r} has {len(tokens)} tokens, not {TOKENS}")
        return tokens

    def loss(self, read: Tensor, tokens: Tensor) -> Tensor:
        """The mean squared error, relative to the embeddings' mean square.

        A cross-entropy over their products with the table would make the right token the most likely one, but give
        embeddings that no language model can read.
        """
        wanted = self._table[tokens]
        return functional.mse_loss(read, wanted) / wanted.square().mean()

    def read(self, embeddings: Tensor) -> Tensor:
        """The tokens with the nearest embeddings, int64 [rows, TOKENS]."""
        return torch.cdist(embeddings.flatten(0, 1), self._table).argmin(1).view(embeddings.shape[:2])


def train_tower(model: LlavaForConditionalGeneration, processor: LlavaProcessor) -> None:
    """Train tower and projector in place, on pictures of sums of the training split."""
    table = model.get_input_embeddings().weight.detach()[:-1]
    reading, unseen = Reading(table, processor, PICTURES, "pictures"), Reading(table, processor, 200, "unseen")
    model.model.language_model.requires_grad_(False)
    # In bfloat16 on a CPU the fused kernel's backward pass is twice as slow.
    model.model.vision_tower.set_attn_implementation("eager")
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=RATE, betas=(0.9, 0.98), weight_decay=0.01)
    drawing, started = torch.Generator().manual_seed(0), time.perf_counter()
    end, step = STEPS, 0
    while step < end:
        step += 1
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, step / 100, (end + 1 - step) / DECAY)
        pixels, tokens = reading.batch(torch.randint(len(reading), (BATCH,), generator=drawing))
        loss = reading.loss(_embedded(model, pixels), tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == end:
            share = _share_read(model, unseen)
            print(
                f"tower     step {step:5d}  loss {loss.item():.5f}  read {share:.1%}"
                f"  {time.perf_counter() - started:6.1f} s", flush=True,
            )  # fmt: skip
            if share >= ENOUGH and end == STEPS:
                end = min(STEPS, step + DECAY)
    model.eval()


def _embedded(model: LlavaForConditionalGeneration, pixels: Tensor) -> Tensor:
    """The projector's output for pictures: float32 [rows, TOKENS, width]."""
    with torch.autocast("cpu", torch.bfloat16):
        return torch.stack(model.get_image_features(pixels).pooler_output).float()


@torch.no_grad()
def _share_read(model: LlavaForConditionalGeneration, reading: Reading) -> float:
    """The share of pictures that are read without a wrong token."""
    pixels, tokens = reading.batch(torch.arange(len(reading)))
    read = reading.read(_embedded(model, pixels))
    return (read == tokens).all(1).float().mean().item()


@torch.inference_mode()
def picture_answers(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, scenes: Sequence[Scene], language: Language
) -> list[str]:
    """The first line of each greedy answer."""
    answers = []
    for start in range(0, len(scenes), 250):
        part = scenes[start : start + 250]
        texts = [processor.tokenizer.bos_token + scene.asked(language).prompt for scene in part]
        inputs = processor(text=texts, images=[[picture(scene)] for scene in part], return_tensors="pt",
                           padding=True, add_special_tokens=False)  # fmt: skip
        output = model.generate(**inputs, max_new_tokens=32, do_sample=False)
        decoded = processor.tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        answers += [text.split("\n")[0] for text in decoded]
    return answers


def save_vision_model(model: LlavaForConditionalGeneration, processor: LlavaProcessor, folder: Path) -> None:
    """A plain Hugging Face folder, in bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    half = LlavaForConditionalGeneration(model.config).bfloat16()
    half.load_state_dict(model.state_dict())
    half.generation_config = model.generation_config
    half.save_pretrained(folder)
    processor.tokenizer.backend_tokenizer.no_padding()
    processor.save_pretrained(folder)
