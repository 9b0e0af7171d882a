"""What operators refuse, and the types, shares and regions of what they make."""

from __future__ import annotations

import pytest

from mpk_spec.ops import MADE_BY_PLANNER, all_ops, public_ops
from mpk_spec.ops.base import Axis, OpError, TensorType, register

SPLIT = frozenset({"inter"})


def value(*sizes: int, **more) -> TensorType:
    return TensorType(tuple(Axis(s) for s in sizes), **more)


def split(*sizes: int) -> TensorType:
    """A value or weight whose last axis tensor parallelism divides."""
    *whole, last = sizes
    return TensorType((*(Axis(s) for s in whole), Axis(last, SPLIT, SPLIT)))


CACHE = value(2, 16, kind="cache")
ROUTE = value(2, 3, dtype="f32", kind="route")
GAIN = {"weight": "g", "eps": 1e-5}
NUMBERS = {"eps": 1e-5, "weight_offset": 0}


def infer(name: str, fields: dict, inputs: list[TensorType], weights=None, values=None) -> TensorType:
    return all_ops()[name].model_validate({name: "a", **fields}).infer(inputs, weights or {}, values or {})


CASES = {
    "gain": (
        ("rmsnorm", GAIN, [value(96)], {"weight": value(64)}, NUMBERS),
        "the gain has shape [64], the rows that it scales [96]", "weight", None,
    ),
    "gain of a value without axes": (
        ("rmsnorm", GAIN, [value()], {"weight": value(64)}, NUMBERS),
        "the gain has shape [64], the rows that it scales []", "weight", None,
    ),
    "norm of a split row": (
        ("rmsnorm", GAIN, [split(48)], {"weight": value(48)}, NUMBERS),
        "a norm over a row that tensor parallelism splits", "rmsnorm", None,
    ),
    "split gain": (
        ("rmsnorm", GAIN, [value(96)], {"weight": split(48)}, NUMBERS),
        "a norm needs the whole row, and tensor parallelism splits the gain", "weight", "do not split its dim",
    ),
    "eps": (
        ("rmsnorm", GAIN, [value(96)], {"weight": value(96)}, {"eps": None, "weight_offset": 0}),
        "'eps' must be a number, it is none", "eps", None,
    ),
    "weight axes": (
        ("linear", {"weight": "w"}, [value(96)], {"weight": value(4, 96, 8)}),
        "a linear weight is [out, in], got [4, 96, 8]", "weight", None,
    ),
    "expert weight axes": (
        ("linear", {"weight": "w", "experts": "r"}, [value(96), ROUTE], {"weight": value(96, 8)}),
        "a linear weight is [experts, out, in], got [96, 8]", "weight", None,
    ),
    "weight columns": (
        ("linear", {"weight": "w"}, [value(96)], {"weight": value(8, 64)}),
        "the input has 96 features, the weight takes 64", "weight", None,
    ),
    "split input": (
        ("linear", {"weight": "w"}, [split(96)], {"weight": value(8, 96)}),
        "the input is split over ranks and the weight's columns are not", "weight",
        "'shard' must split or replicate both",
    ),
    "split weight": (
        ("linear", {"weight": "w"}, [value(96)], {"weight": split(8, 96)}),
        "the weight's columns are split over ranks and the input is not", "weight",
        "'shard' must split or replicate both",
    ),
    "bias": (
        ("linear", {"weight": "w", "bias": "b"}, [value(96)], {"weight": value(8, 96), "bias": value(9)}),
        "the bias has shape [9], the result [8]", "bias", None,
    ),
    "heads": (
        ("linear", {"weight": "w", "heads": 3}, [value(96)], {"weight": value(8, 96)}, {"heads": 3}),
        "8 features do not fold into 3 heads", "heads", None,
    ),
    "heads as a fraction": (
        ("linear", {"weight": "w", "heads": 3}, [value(96)], {"weight": value(8, 96)}, {"heads": 2.5}),
        "'heads' must be a positive whole number, it is 2.5", "heads", None,
    ),
    "no routing": (
        ("linear", {"weight": "w", "experts": "r"}, [value(96), value(8)], {"weight": value(4, 8, 96)}),
        "'r' is no routing", "experts", "name the value of a 'top_k' operator",
    ),
    "rope without heads": (
        ("rope", {"parameters": "p"}, [value(64)], {}, {"parameters": {}}),
        "rope needs a value with heads, got [64]", "rope", "give its linear 'heads: ...'",
    ),
    "rope of an odd head": (
        ("rope", {"parameters": "p"}, [value(4, 15)], {}, {"parameters": {}}),
        "rope needs an even head size, got 15", "rope", None,
    ),
    "rope parameters": (
        ("rope", {"parameters": "p"}, [value(4, 16)], {}, {"parameters": 1e4}),
        "rope parameters are a map with 'rope_type' and 'rope_theta', got 10000.0", "parameters", None,
    ),
    "no cache": (
        ("attention", {"cache": "c", "scale": 1}, [value(8, 16), value(2, 16)], {}, {"scale": 1}),
        "'c' is no cache", "cache", "name the value of a 'kv_append' operator",
    ),
    "head sizes": (
        ("attention", {"cache": "c", "scale": 1}, [value(8, 32), CACHE], {}, {"scale": 1}),
        "queries are [8, 32], keys [2, 16]", "attention", None,
    ),
    "query heads": (
        ("attention", {"cache": "c", "scale": 1}, [value(7, 16), CACHE], {}, {"scale": 1}),
        "7 query heads do not divide over 2 KV heads", "attention", None,
    ),
    "window": (
        ("attention", {"cache": "c", "scale": 1}, [value(8, 16), CACHE], {}, {"scale": 1, "window": "wide"}),
        "'window' must be a positive whole number or none, it is 'wide'", "window", None,
    ),
    "embedding table": (
        ("embedding", {"weight": "w"}, [value(1)], {"weight": value(8)}, {"scale": 1}),
        "an embedding table is [vocab, hidden], got [8]", "weight", None,
    ),
    "split embedding": (
        ("embedding", {"weight": "w"}, [value(1)], {"weight": split(8, 96)}, {"scale": 1}),
        "the embedding table must be on every rank", "weight", "give the weight 'shard: replicate'",
    ),
    "choices": (
        ("top_k", {"k": 9}, [value(8)], {}, {"k": 9}),
        "k must be between 1 and the 8 experts, got 9", "k", None,
    ),
    "split scores": (
        ("top_k", {"k": 2}, [split(8)], {}, {"k": 2}),
        "the scores of all experts are needed, and tensor parallelism splits them", "top_k",
        "give the router's weight 'shard: replicate'",
    ),
    "logits": (
        ("sample", {}, [value(8, 64)]),
        "logits are [vocab], got [8, 64]", "sample", None,
    ),
}  # fmt: skip
TWO = {
    "shapes of a sum": (
        ("add", [value(96), value(64)]), "add needs operands of one shape, got [96] and [64]", None, None,
    ),
    "routed sum": (
        ("add", [value(96, routed=3), value(96, routed=3)]), "a sum of routed rows", "add", "put 'combine' before it",
    ),
    "keys and values": (
        ("kv_append", [value(2, 16), value(4, 8)]),
        "keys and values must be [kv_heads, head_dim] alike, got [2, 16] and [4, 8]", "kv_append", None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_refused(case):
    given, message, field, hint = CASES[case]
    with pytest.raises(OpError) as caught:
        infer(*given)
    assert (caught.value.message, caught.value.field, caught.value.hint) == (message, field, hint)


@pytest.mark.parametrize("case", TWO)
def test_two_operands_refused(case):
    (name, inputs), message, field, hint = TWO[case]
    more = {"state": "kv"} if name == "kv_append" else {}
    with pytest.raises(OpError) as caught:
        all_ops()[name].model_validate({name: ["a", "b"], **more}).infer(inputs, {}, {})
    assert (caught.value.message, caught.value.field, caught.value.hint) == (message, field, hint)


def test_combine_refuses():
    made = all_ops()["combine"].model_validate({"combine": "a", "route": "r"})
    with pytest.raises(OpError, match="'r' is no routing"):
        made.infer([value(96, routed=3), value(6)], {}, {})
    with pytest.raises(OpError, match="'a' has no row per chosen expert"):
        made.infer([value(96), ROUTE], {}, {})


def test_types():
    q = infer("linear", {"weight": "w", "heads": 4}, [value(96)], {"weight": split_rows(64, 96)}, {"heads": 4})
    assert q.shape == (4, 16) and q.axes[0].split == SPLIT and not q.axes[1].split and not q.partial
    o = infer("linear", {"weight": "w"}, [split(48)], {"weight": split(96, 48)})
    assert o.partial and o.shape == (96,) and o.dtype == "bf16"
    routed = infer("linear", {"weight": "w", "experts": "r"}, [value(96), ROUTE], {"weight": value(8, 32, 96)})
    assert routed.routed == 3 and routed.shape == (32,)
    total = all_ops()["add"].model_validate({"add": ["a", "b"]}).infer([value(96), value(96)], {}, {})
    assert total.dtype == "f32"
    mixed = all_ops()["combine"].model_validate({"combine": "a", "route": "r"})
    assert mixed.infer([value(96, routed=3, partial=True), ROUTE], {}, {}).partial
    assert not infer("all_reduce", {}, [value(96, partial=True)]).partial


def split_rows(*sizes: int) -> TensorType:
    first, *rest = sizes
    return TensorType((Axis(first, SPLIT, SPLIT), *(Axis(s) for s in rest)))


def test_regions():
    """Which features of an input the features of a result need."""
    partial = all_ops()["argmax_partial"](argmax_partial="a", slices=10, unit=10, vocab=95, valid=95, rank_stride=0)
    assert partial.needs((2, 6), partial.infer([value(95)], {}, {}), [value(95)]) == ((10, 30),)
    assert partial.needs((18, 20), partial.infer([value(95)], {}, {}), [value(95)]) == ((90, 95),)
    few = partial.model_copy(update={"slices": 4})  # of 2, 3, 2 and 3 units
    assert [few.edge(n) for n in range(5)] == [0, 20, 50, 70, 95]
    mixed = all_ops()["combine"].model_validate({"combine": "a", "route": "r"})
    assert mixed.needs((8, 16), value(96), [value(96, routed=3), ROUTE]) == ((8, 16), (0, 6))
    assert all_ops()["linear"].model_validate({"linear": "a", "weight": "w"}).needs((0, 8), value(8), [value(96)]) == (
        (0, 96),
    )
    assert infer("rmsnorm", GAIN, [value(4, 16)], {"weight": value(16)}, NUMBERS).features == 64
    assert all_ops()["rmsnorm"].model_validate({"rmsnorm": "a", **GAIN}).granule(value(4, 16)) == 16


def test_what_a_spec_may_write():
    assert set(all_ops()) - set(public_ops()) == MADE_BY_PLANNER
    with pytest.raises(ValueError, match="operator 'add' is registered twice"):
        register(type("Other", (all_ops()["add"],), {"__module__": "elsewhere"}))
