"""Captions as a condition: tokens, and a small transformer encoder that is trained together with the model.

Axes: B images, A captions of an image, L tokens of a caption, D the width of a network's contexts, H heads, E = D / H.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twostage.core.conditions.condition import Condition, ConditionConfig, ConditionedSplit, ConditionSource
from twostage.core.conditions.context import Context, ContextForm, ContextSpace
from twostage.core.conditions.vocabulary import Units, Vocabulary
from twostage.core.config.sections import Count, Depth
from twostage.core.data.spread import spread
from twostage.core.errors import InputError
from twostage.core.training.random import BatchRandom
from twostage.core.wording import some_of

__all__ = ["TextCondition", "TextConditionConfig"]

HEAD_WIDTH, NUM_EXAMPLES = 64, 32


@ConditionConfig.register
class TextConditionConfig(ConditionConfig):
    """The image's caption."""

    plural = "captions"

    type: Literal["text"] = "text"
    units: Units = "byte_pairs"
    """`words`: those of the training captions, and a prompt with another word is refused; `bytes`: any text, with the
    longest sequences; `byte_pairs`: any text, and frequent sequences of bytes are one token."""
    vocabulary_size: Count = 1024
    """The largest number of words or byte pairs."""
    max_length: Count = 32
    """Tokens of a caption; longer captions are cut."""
    depth: Depth = 2
    """Blocks of the encoder."""
    vocabulary: Vocabulary | None = None
    """Learned from the training captions."""
    examples: tuple[str, ...] = ()
    """Some held-out captions: what is drawn if no prompt is given."""

    @property
    def form(self) -> ContextForm:
        return ContextForm(pooled=True, sequence=self.max_length)

    def learned_from(self, source: ConditionSource) -> "TextConditionConfig":
        captions = _captions_of(source)
        if captions is None:
            raise InputError(
                f"condition.type 'text': no captions in {source.name}. Use images with captions (a column caption, "
                "metadata.jsonl, or NAME.txt beside NAME.png)"
            )
        vocabulary = Vocabulary.learned_from(captions, self.units, self.vocabulary_size)
        held_out = source.validation
        shown = held_out.read_captions(spread(len(held_out), NUM_EXAMPLES)) or []
        examples = [text for texts in shown for text in texts[:1] if self._can_be_read(text, vocabulary)]
        return self.model_copy(update={"vocabulary": vocabulary, "examples": tuple(dict.fromkeys(examples))})

    def notices(self, source: ConditionSource) -> list[str]:
        captions, found = _captions_of(source) or [], []
        assert self.vocabulary is not None
        if cut := sum(len(self.vocabulary.tokens(text)) > self.max_length for text in captions):
            found.append(
                f"{cut:,} of {len(captions):,} captions have more than {self.max_length} tokens, so their ends are "
                "not used; to use more, set condition.max_length"
            )
        held_out = source.validation
        others = [t for texts in held_out.read_captions(torch.arange(len(held_out))) or [] for t in texts]
        unknown = {word for text in others for word in self.vocabulary.unknown_words(text)}
        if unknown:
            words = some_of(sorted(unknown))
            found.append(f"words of held-out captions that no training caption has, and that are not used: {words}")
        return found

    def _can_be_read(self, text: str, vocabulary: Vocabulary) -> bool:
        return not vocabulary.unknown_words(text) and 0 < len(vocabulary.tokens(text)) <= self.max_length

    def build(self, space: ContextSpace) -> "TextCondition":
        if self.vocabulary is None:
            raise InputError(
                "condition.type 'text': vocabulary is None, expected one that was learned from captions. Set "
                "vocabulary=Vocabulary.learned_from(captions)"
            )
        return TextCondition(self, self.vocabulary, space)


def _captions_of(source: ConditionSource) -> list[str] | None:
    """The captions of the training images; variants of an image have the same."""
    found = source.splits["train"].read_captions(torch.arange(source.num_images))
    return None if found is None else [text for texts in found for text in texts]


class EncoderBlock(nn.Module):
    """Self-attention among the tokens of a caption and an MLP, each added to the stream."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_heads = next(heads for heads in range(max(1, width // HEAD_WIDTH), 0, -1) if width % heads == 0)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.attention_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp_in, self.mlp_out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D); ``mask`` (B, 1, 1, L) is added to the scores."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + mask.to(q.dtype)  # (B, H, L, L)
        x = x + self.attention_out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return x + self.mlp_out(F.gelu(self.mlp_in(self.norm2(x)), approximate="tanh"))


class TextCondition(Condition):
    """Values are the tokens of an image's captions, (B, A, L) int64, 0 after their ends. An image without captions has
    no token at all, and says nothing."""

    def __init__(self, config: TextConditionConfig, vocabulary: Vocabulary, space: ContextSpace) -> None:
        super().__init__()
        self.vocabulary, self.max_length = vocabulary, config.max_length
        self.token_embedding = nn.Embedding(vocabulary.size, space.width)
        self.positions = nn.Parameter(torch.empty(config.max_length, space.width))
        self.blocks = nn.ModuleList([EncoderBlock(space.width) for _ in range(config.depth)])
        self.norm = nn.LayerNorm(space.width)
        self.pooled_out = nn.Linear(space.width, space.width)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.positions, std=0.02)
        nn.init.normal_(self.pooled_out.weight, std=space.std * space.width**-0.5)

    def nothing(self, count: int) -> Tensor:
        return torch.zeros(count, 1, self.max_length, dtype=torch.long)

    def read(self, split: ConditionedSplit, rows: Tensor) -> Tensor | None:
        captions = split.read_captions(rows)
        return None if captions is None else self._tokens(captions)

    def parse(self, value: str) -> Tensor:
        if not value.strip():
            raise InputError("prompt '': expected a text. Omit it to draw without a prompt")
        self.vocabulary.check(value)
        if (length := len(self.vocabulary.tokens(value))) > self.max_length:
            raise InputError(
                f"prompt {value!r}: has {length} tokens, expected at most {self.max_length}. Use fewer words"
            )
        return self._tokens([(value,)])

    def check(self, values: Tensor) -> None:
        if (
            values.ndim != 3
            or values.shape[2] != self.max_length
            or values.is_floating_point()
            or values.max() >= self.vocabulary.size
        ):
            raise InputError(
                f"condition 'text': expected tokens below {self.vocabulary.size} of the shape (images, captions, "
                f"{self.max_length}), got {values.dtype} of the shape {tuple(values.shape)}"
            )

    def one_of_each(self, values: Tensor, random: BatchRandom) -> Tensor:
        """Draws one of each image's captions: (B, A, L) -> (B, 1, L)."""
        if values.shape[1] == 1:
            return values
        counts = (values[:, :, 0] != 0).sum(1)
        drawn = (random.uniform("caption", (), values.device) * counts).long()
        return values[torch.arange(len(values), device=values.device), drawn][:, None]

    def forward(self, values: Tensor) -> Context:
        tokens = values[:, 0]  # (B, L)
        present = tokens != 0
        visible = present.clone()
        visible[:, 0] = True  # so that a caption without tokens has no empty softmax
        mask = torch.zeros(visible.shape, device=tokens.device).masked_fill_(~visible, -torch.inf)[:, None, None]
        x = self.token_embedding(tokens) + self.positions
        for block in self.blocks:
            x = block(x, mask)
        x = self.norm(x)
        weights = present.to(x.dtype)[..., None]
        mean = (x * weights).sum(1) / weights.sum(1).clamp(min=1)
        pooled = self.pooled_out(mean) * present.any(1, keepdim=True)
        return Context(len(tokens), pooled=pooled, sequence=x, present=present)

    def taken_over(self, earlier: "TextCondition") -> tuple[dict[str, Tensor], str]:
        """Tokens by their text; new ones start as the mean of all."""
        state, names = earlier.state_dict(), self.vocabulary.token_names
        rows = {name: row for row, name in enumerate(earlier.vocabulary.token_names)}
        before = state["token_embedding.weight"]
        table = before[1:].mean(0).repeat(self.vocabulary.size, 1)
        known = [row for row, name in enumerate(names) if name in rows]
        table[known] = before[[rows[names[row]] for row in known]]
        state["token_embedding.weight"] = table
        return state, f"{len(known) - 1:,} of {len(names) - 1:,} tokens of captions are the same"

    def _tokens(self, captions: list[tuple[str, ...]]) -> Tensor:
        """(B, A, L) int64: A is the largest number of captions that have tokens."""
        found = [[t for text in texts if (t := self.vocabulary.tokens(text)[: self.max_length])] for texts in captions]
        values = torch.zeros(len(found), max(1, *map(len, found), 1), self.max_length, dtype=torch.long)
        for i, texts in enumerate(found):
            for j, tokens in enumerate(texts):
                values[i, j, : len(tokens)] = torch.tensor(tokens)
        return values
