"""Presets: the objectives of papers, as arguments for ``wrap``.

``fxdistill.wrap(student, teacher, **fxdistill.presets.hinton())``. A preset is a dict: print it to
see the paper and what is set, and change it like a dict. Its weights make the total the one of the
paper: ``feature_weight`` is the number of matches where the paper adds them up, because ``wrap``
takes their mean.
"""

import functools
from typing import Any

from torch import nn

from fxdistill.errors import CountError, OptionError
from fxdistill.losses.attention import attention_mse, relation_kl
from fxdistill.mapping.match import Match
from fxdistill.recipes.encoders import (
    Layer,
    Layers,
    hidden_size,
    last_hidden,
    layers_of,
    require_equal,
    require_module,
)
from fxdistill.recipes.numbers import require
from fxdistill.recipes.preset import Preset
from fxdistill.recipes.self_distillation import be_your_own_teacher

__all__ = ["be_your_own_teacher", "distilbert", "hinton", "minilm", "rkd", "tinybert"]

_ATTENTION: dict[str, Any] = {"student_port": "attention", "teacher_port": "attention"}


def hinton(temperature: float = 4, alpha: float = 0.7) -> Preset:
    """Knowledge distillation: α·τ²·KL(p_T ‖ p_S) + (1 - α)·CE(labels).

    Hinton, Vinyals & Dean (2015), "Distilling the Knowledge in a Neural Network", section 2: a
    weighted average of the cross entropy with the teacher's soft targets at τ, times τ², and of the
    cross entropy with the labels at τ = 1. The KL is that cross entropy without the teacher's
    entropy, which is a constant: the gradients are the same.

    Args:
        temperature: τ.
        alpha: The weight α of the soft targets, from 0 to 1.

    Returns:
        Arguments for ``wrap``.

    Raises:
        OptionError: τ is not positive, or α not between 0 and 1.
    """
    require("hinton", "temperature", temperature, above=0)
    require("hinton", "alpha", alpha, most=1)
    return Preset(
        f"hinton(temperature={temperature}, alpha={alpha})",
        "Hinton, Vinyals & Dean (2015), Distilling the Knowledge in a Neural Network",
        {
            "logit_loss": "forward_kl",
            "temperature": temperature,
            "logit_weight": alpha,
            "label_loss": "cross_entropy",
            "label_weight": 1 - alpha,
        },
    )


def distilbert(
    alpha_ce: float = 0.5,
    alpha_mlm: float = 0.5,
    alpha_cos: float = 0.0,
    temperature: float = 2,
    *,
    student: nn.Module | None = None,
    teacher: nn.Module | None = None,
) -> Preset:
    """DistilBERT's triple loss: α_ce·L_ce + α_mlm·L_mlm + α_cos·L_cos.

    Sanh, Debut, Chaumond & Wolf (2019), "DistilBERT, a distilled version of BERT", section 3. L_ce
    compares predictions at τ (as its authors' code does, by τ²·KL), L_mlm is the cross entropy with
    the labels, L_cos is 1 - cos of the last hidden states, over the tokens that are no padding.
    With labels, L_ce is over the predictions that have one.

    Args:
        alpha_ce: The weight of the soft targets.
        alpha_mlm: The weight of the labels.
        alpha_cos: The weight of the directions of hidden states. Above 0 it needs both models.
        temperature: τ.
        student: The student, whose last hidden states are looked for.
        teacher: The teacher, likewise; its hidden states are as wide as the student's.

    Returns:
        Arguments for ``wrap``.

    Raises:
        OptionError: A weight is negative, τ is not positive, or a model is missing.
        StructureError: The last hidden states cannot be found, or differ in width.
    """
    if isinstance(alpha_ce, nn.Module) or isinstance(alpha_mlm, nn.Module):
        raise OptionError("distilbert takes the models by keyword: student=..., teacher=...")
    alphas = {"alpha_ce": alpha_ce, "alpha_mlm": alpha_mlm, "alpha_cos": alpha_cos}
    for name, alpha in alphas.items():
        require("distilbert", name, alpha)
    require("distilbert", "temperature", temperature, above=0)
    arguments: dict[str, Any] = {
        "logit_loss": "forward_kl",
        "temperature": temperature,
        "logit_weight": alpha_ce,
        "label_loss": "cross_entropy",
        "label_weight": alpha_mlm,
    }
    if alpha_cos > 0:
        name = "distilbert with alpha_cos > 0"
        ends = [last_hidden(m, of, name) for m, of in _both(student, teacher, name)]
        widths = [hidden_size(m) for m, _ in _both(student, teacher, name)]
        require_equal(name, "width", widths[0], widths[1])
        arguments["mapping"] = [Match(*ends, loss="cosine")]
        arguments["feature_weight"] = alpha_cos
    told = ", ".join(f"{name}={value}" for name, value in alphas.items())
    return Preset(
        f"distilbert({told}, temperature={temperature})",
        "Sanh, Debut, Chaumond & Wolf (2019), DistilBERT, a distilled version of BERT",
        arguments,
    )


def tinybert(student: nn.Module, teacher: nn.Module, *, prediction: bool = True) -> Preset:
    """TinyBERT: Σ over layers of L_attn + L_hidn, plus L_embd and L_pred, all with weight 1.

    Jiao et al. (2020), "TinyBERT: Distilling BERT for Natural Language Understanding", equations 7
    to 11: L_attn is the mean square difference of attention scores before softmax, of each head and
    its counterpart; L_hidn that of what layers return, L_embd that of what enters the first of
    them, through a learned linear map where widths differ (here one for each match); L_pred the
    cross entropy with the teacher's predictions at τ = 1. Student layer m learns from teacher layer
    m·N/M, rounded up. Labels have no part.

    Args:
        student: A transformer of M layers.
        teacher: A transformer of N layers, N ≥ M, with as many heads.
        prediction: ``False`` leaves L_pred out, as in the paper's general distillation, and where
            layers are learned first.

    Returns:
        Arguments for ``wrap``.

    Raises:
        StructureError: A model is not one stack of layers that attend, or the numbers of heads
            differ.
        CountError: The student has more layers than the teacher.
    """
    name = "tinybert"
    s, t = (layers_of(m, of, name) for m, of in _both(student, teacher, name))
    require_equal(name, "numbers of heads", s.heads, t.heads)
    project = None if s.width is not None and s.width == t.width else "auto"
    scores = functools.partial(attention_mse, scores=True)
    first = s.layers[0].path, t.layers[0].path
    hidden: dict[str, Any] = {"loss": "mse", "project": project}
    mapping = [Match(*first, student_port="input", teacher_port="input", **hidden)]
    for a, b in _uniform(s, t, name):
        mapping.append(Match(s.attention(a), t.attention(b), loss=scores, **_ATTENTION))
        mapping.append(Match(a.path, b.path, **hidden))
    return Preset(
        f"tinybert(student, teacher{'' if prediction else ', prediction=False'})",
        "Jiao et al. (2020), TinyBERT: Distilling BERT for Natural Language Understanding",
        {
            "mapping": mapping,
            "feature_weight": float(len(mapping)),
            "logit_loss": "soft_cross_entropy" if prediction else None,
            "temperature": 1.0,
            "label_loss": None,
        },
    )


def minilm(
    student: nn.Module,
    teacher: nn.Module,
    *,
    version: int = 2,
    heads: int | None = None,
    teacher_layer: int = -1,
) -> Preset:
    """MiniLM: the relations between tokens in the last layer, without labels or predictions.

    Version 2 (Wang et al., 2021, "MiniLMv2: Multi-Head Self-Attention Relation Distillation"):
    L_QQ + L_KK + L_VV, each the mean over heads and tokens of KL(teacher's relations ‖ student's),
    relations softmax(h hᵀ/√d) among queries, keys or values, whose heads are joined and cut anew.
    Version 1 (Wang et al., 2020, "MiniLM: Deep Self-Attention Distillation"): L_AT + L_VR, the KL
    of the maps of attention, head by head, and of the relations among values.

    Args:
        student: A transformer of any width and depth.
        teacher: A transformer; in version 1 with as many heads as the student.
        version: 2 or 1.
        heads: The number of relation heads in version 2 (48 in the paper, for widths of 768 and
            384); ``None``: the smaller of both models' numbers of heads.
        teacher_layer: The teacher's layer, counted as in a list. For large teachers the paper takes
            an upper middle one, the 21st of 24 (20).

    Returns:
        Arguments for ``wrap``.

    Raises:
        OptionError: ``version``, ``heads`` or ``teacher_layer`` do not exist.
        StructureError: A model is not one stack of layers that attend, or in version 1 the numbers
            of heads differ.
    """
    if version not in (1, 2):
        raise OptionError(f"minilm: version={version!r}: 1 or 2")
    name = "minilm" if version == 2 else "minilm(version=1)"
    s, t = (layers_of(m, of, name) for m, of in _both(student, teacher, name))
    ends = s.attention(s.layers[-1]), t.attention(_layer(t, teacher_layer))
    if version == 1:
        if heads is not None:
            raise OptionError(f"{name} compares heads as they are: heads={heads} is of version 2")
        require_equal(name, "numbers of heads", s.heads, t.heads)
        of_values = functools.partial(relation_kl, of="v", heads=s.heads)
        compared: list[Any] = ["attention_kl", of_values]
    else:
        if heads is not None and (type(heads) is not int or heads < 1):
            raise OptionError(f"minilm: heads={heads!r}: a number of relation heads, 1 or more")
        compared = [functools.partial(relation_kl, of=of, heads=heads) for of in ("q", "k", "v")]
    mapping = [Match(*ends, loss=loss, **_ATTENTION) for loss in compared]
    papers = {
        1: "Wang et al. (2020), MiniLM: Deep Self-Attention Distillation",
        2: "Wang et al. (2021), MiniLMv2: Multi-Head Self-Attention Relation Distillation",
    }
    return Preset(
        f"minilm(student, teacher, version={version})",
        papers[version],
        {
            "mapping": mapping,
            "feature_weight": float(len(mapping)),
            "logit_loss": None,
            "label_loss": None,
        },
    )


def rkd(path_s: str, path_t: str, distance: float = 25, angle: float = 50) -> Preset:
    """Relational knowledge distillation: 25·L_D + 50·L_A, plus the cross entropy with labels.

    Park, Kim, Lu & Cho (2019), "Relational Knowledge Distillation", section 3: L_D compares the
    distances between samples, divided by their mean, L_A the angles of triples; each is the mean
    Huber loss. The labels, where a call has them, are the paper's L_task.

    Args:
        path_s: The student's module whose output is compared, of any width: the embedding of a
            sample, ``[B, D]``; maps and tokens are averaged to that. With a pattern of several
            modules, the total is the mean over these.
        path_t: The teacher's module.
        distance: The weight of L_D; 0 leaves it out.
        angle: The weight of L_A; 0 leaves it out.

    Returns:
        Arguments for ``wrap``.

    Raises:
        OptionError: A weight is negative or both are 0, or a path is no text.
    """
    for side, path in (("path_s", path_s), ("path_t", path_t)):
        if not isinstance(path, str):
            raise OptionError(f"rkd: {side}={path!r}: the path of a module, as text")
    weights = {"distance_wise": distance, "angle_wise": angle}
    for name, weight in zip(("distance", "angle"), weights.values(), strict=True):
        require("rkd", name, weight)
    # One match for each loss: wrap's mean over the matches, times their number, is the sum.
    mapping = [Match(path_s, path_t, loss=loss, weight=w) for loss, w in weights.items() if w > 0]
    if not mapping:
        raise OptionError("rkd: distance and angle are both 0, so nothing is compared")
    return Preset(
        f"rkd({path_s!r}, {path_t!r}, distance={distance}, angle={angle})",
        "Park, Kim, Lu & Cho (2019), Relational Knowledge Distillation",
        {"mapping": mapping, "feature_weight": float(len(mapping)), "logit_loss": None},
    )


# ------------------------------------------------------------------ layers


def _both(
    student: nn.Module | None, teacher: nn.Module | None, preset: str
) -> list[tuple[nn.Module, str]]:
    found = []
    for model, of in ((student, "student"), (teacher, "teacher")):
        require_module(model, of, preset)
        assert model is not None
        found.append((model, of))
    return found


def _uniform(s: Layers, t: Layers, preset: str) -> list[tuple[Layer, Layer]]:
    """Each student layer with the last teacher layer of its share."""
    n, m = len(s.layers), len(t.layers)
    if n > m:
        raise CountError(
            f"{preset} gives each student layer a teacher layer of its own, and the student has "
            f"{n} layers, the teacher {m}"
        )
    return [(s.layers[i], t.layers[-(-(i + 1) * m // n) - 1]) for i in range(n)]


def _layer(layers: Layers, index: int) -> Layer:
    count = len(layers.layers)
    if type(index) is not int or not -count <= index < count:
        raise OptionError(f"minilm: teacher_layer={index!r}, and the teacher has {count} layers")
    return layers.layers[index]
