"""What presets ask of a transformer: its layers, where these attend, and its last hidden state."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from fxdistill.distiller.alone import calls_of
from fxdistill.errors import OptionError, StructureError
from fxdistill.mapping.attends import is_named_attention
from fxdistill.models.dummy_inputs import dummy_inputs
from fxdistill.models.landmarks import norms_of
from fxdistill.models.structure import Block, Stack, stacks_of
from fxdistill.objective.call import Inputs

_CROSS = ("cross", "encdec", "encoder_attn")
_HEADS = ("num_attention_heads", "n_heads", "n_head", "num_heads")


_DEPTHS = ("num_hidden_layers", "n_layers", "n_layer", "num_layers")


class Layer(NamedTuple):
    """One layer: a block, and which call of it, where layers share weights."""

    block: Block
    call: int = 0

    def at(self, path: str) -> str:
        """A module of the block as a match names it: ``path@k`` for the k-th further call."""
        return f"{path}@{self.call}" if self.call else path

    @property
    def path(self) -> str:
        """The layer as a match names it."""
        return self.at(self.block.path)


@dataclass(frozen=True)
class Layers:
    """The layers of a model in their order; ``of`` names the model in errors.

    They are the blocks of one stack, and where these share weights their calls.
    """

    model: nn.Module
    of: str
    preset: str
    layers: tuple[Layer, ...]

    @property
    def width(self) -> int | None:
        """The width of the stream between blocks, if it can be told."""
        return self.layers[0].block.width

    @property
    def heads(self) -> int | None:
        """The number of heads of queries, if config or attention says it."""
        attends = self.model.get_submodule(self.attention(Layer(self.layers[0].block)))
        for module in (getattr(self.model, "config", None), *attends.modules()):
            for name in _HEADS:
                if type(found := getattr(module, name, None)) is int:
                    return found
        return None

    def attention(self, layer: Layer) -> str:
        """The module of a layer that attends, for the port "attention"."""
        block = layer.block
        within = self.model.get_submodule(block.path)
        for name, module in within.named_modules():
            told = f"{name} {type(module).__name__}".lower()
            of_itself = is_named_attention(module) and not any(word in told for word in _CROSS)
            if name and of_itself and not isinstance(module, nn.MultiheadAttention):
                return layer.at(f"{block.path}.{name}")
        named = [part.path for part in block.of("mixer") if part.kind == "attention"]
        if named and not isinstance(self.model.get_submodule(named[0]), nn.MultiheadAttention):
            return layer.at(named[0])
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
    return Layers(model, of, preset, _layers(model, stacks[0], of, preset))


def _layers(model: nn.Module, stack: Stack, of: str, preset: str) -> tuple[Layer, ...]:
    """The blocks, or their calls where the config says that there are more layers than blocks."""
    once = tuple(Layer(block) for block in stack.blocks)
    config = getattr(model, "config", None)
    depths = [n for name in _DEPTHS if type(n := getattr(config, name, None)) is int]
    if not depths or depths[0] <= len(once):
        return once
    made, blocks = dummy_inputs(model), {block.path: block for block in stack.blocks}
    calls = None if made is None else calls_of(model, blocks, Inputs((), made))
    if calls is None:
        raise StructureError(
            f"{preset}: the config of the {of} ({type(model).__name__}) says {depths[0]} layers, "
            f"and there are {len(once)} modules ({', '.join(blocks)}): they share weights, and "
            "which of them runs when cannot be told. Name the calls in a mapping of your own: "
            f'"{stack.blocks[0].path}@1" is the second call of a module.'
        )
    return tuple(Layer(blocks[tap.path], tap.call) for tap in calls)


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
    (norm,) = norms_of(model, stacks_of(model))
    return norm or layers.layers[-1].path


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
