"""What presets ask of a transformer: its layers, where these attend, and its last hidden state."""

from dataclasses import dataclass

from torch import nn

from fxdistill.errors import OptionError, StructureError
from fxdistill.mapping.attends import is_named_attention
from fxdistill.models.landmarks import norms_of
from fxdistill.models.structure import Block, Stack, stacks_of

_CROSS = ("cross", "encdec", "encoder_attn")
_HEADS = ("num_attention_heads", "n_heads", "n_head", "num_heads")


@dataclass(frozen=True)
class Layers:
    """The blocks of a model that is one stack of them; ``of`` names the model in errors."""

    model: nn.Module
    of: str
    preset: str
    stack: Stack

    @property
    def width(self) -> int | None:
        """The width of the stream between blocks, if it can be told."""
        return self.stack.blocks[0].width

    @property
    def heads(self) -> int | None:
        """The number of heads of queries, if config or attention says it."""
        attends = self.model.get_submodule(self.attention(self.stack.blocks[0]))
        for module in (getattr(self.model, "config", None), *attends.modules()):
            for name in _HEADS:
                if type(found := getattr(module, name, None)) is int:
                    return found
        return None

    def attention(self, block: Block) -> str:
        """The module of a block that attends, for the port "attention"."""
        within = self.model.get_submodule(block.path)
        for name, module in within.named_modules():
            told = f"{name} {type(module).__name__}".lower()
            of_itself = is_named_attention(module) and not any(word in told for word in _CROSS)
            if name and of_itself and not isinstance(module, nn.MultiheadAttention):
                return f"{block.path}.{name}"
        named = [part.path for part in block.of("mixer") if part.kind == "attention"]
        if named and not isinstance(self.model.get_submodule(named[0]), nn.MultiheadAttention):
            return named[0]
        kinds = ", ".join(part.kind for part in block.of("mixer")) or "nothing that mixes tokens"
        raise StructureError(
            f"{self.preset} compares attention, and {self.of} block {block.path!r} has none that "
            f"can be tapped ({kinds}). Name the modules in a mapping of your own: "
            'Match(student, teacher, student_port="attention", teacher_port="attention").'
        )


def layers_of(model: nn.Module, of: str, preset: str) -> Layers:
    """The layers of ``model``; StructureError unless it is one stack of called blocks."""
    require_module(model, of, preset)
    stacks = stacks_of(model)
    name = type(model).__name__
    if len(stacks) != 1:
        found = ", ".join(repr(stack.path) for stack in stacks) or "none"
        raise StructureError(
            f"{preset} is for models with one stack of layers, and the {of} ({name}) has "
            f"{len(stacks)}: {found}"
        )
    if not all(block.called for block in stacks[0].blocks):
        raise StructureError(
            f"{preset} reads what layers return, and those of the {of} ({name}) are lists, which "
            "return nothing"
        )
    return Layers(model, of, preset, stacks[0])


def last_hidden(model: nn.Module, of: str, preset: str) -> str:
    """The module that returns the last hidden states, behind the final norm if there is one.

    In a model of transformers with a head, it is the model without the head.
    """
    require_module(model, of, preset)
    # Of the class, and not of the model: a model with adapters has the attributes of its base.
    prefix = getattr(type(model), "base_model_prefix", "")
    if prefix and isinstance(getattr(model, prefix, None), nn.Module):
        return str(prefix)
    layers = layers_of(model, of, preset)
    (norm,) = norms_of(model, [layers.stack])
    return norm or layers.stack.blocks[-1].path


def hidden_size(model: nn.Module) -> int | None:
    """The width of the hidden states, by the config, else by the blocks."""
    size = getattr(getattr(model, "config", None), "hidden_size", None)
    if type(size) is int:
        return size
    stacks = stacks_of(model)
    return stacks[-1].blocks[-1].width if stacks else None


def require_equal(preset: str, what: str, student: int | None, teacher: int | None) -> None:
    """Raise StructureError where both numbers are known and differ."""
    if student is not None and teacher is not None and student != teacher:
        raise StructureError(
            f"{preset} is for models of equal {what}, and the student has {student}, the teacher "
            f"{teacher}"
        )


def require_module(model: object, of: str, preset: str) -> None:
    """Raise OptionError where a model is missing."""
    if not isinstance(model, nn.Module):
        raise OptionError(f"{preset} looks at both models: {of}={model!r} is none")
