"""torch's attention call for tensors of any size: it means the same where tensors are streamed."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.nn import functional

import oocattn
from oocattn.nn import scaled_dot_product_attention, streaming
from oocattn.nn.alignment import align
from oocattn.problem.mask import Mask
from oocattn.problem.options import ProblemOptions

STREAMED: dict[str, Any] = {"device_memory": 1}
"""Nothing fits one byte."""

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def tensors(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=random).to(dtype) for shape in shapes]


def assert_as_torch(found: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> None:
    expected = functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), **options)
    assert found.dtype is q.dtype
    assert found.device == q.device
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=TOLERANCE[q.dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("queries", "keys"), [(40, 40), (30, 50), (50, 30)])
def test_is_causal_is_top_left_for_fewer_and_for_more_queries_than_keys(queries: int, keys: int, dtype: torch.dtype) -> None:
    q, k, v = tensors((1, 2, queries, 8), (1, 2, keys, 8), (1, 2, keys, 4), dtype=dtype)
    for limit in (STREAMED, {}):
        assert_as_torch(scaled_dot_product_attention(q, k, v, is_causal=True, **limit), q, k, v, is_causal=True)


@pytest.mark.parametrize(
    ("query", "key", "options"),
    [
        ((30, 8), (40, 8), {}),
        ((3, 30, 8), (3, 40, 8), {"scale": 0.5}),
        ((2, 3, 4, 20, 8), (2, 3, 2, 20, 8), {"enable_gqa": True, "is_causal": True}),
        ((2, 4, 20, 8), (1, 1, 30, 8), {}),
        ((1, 1, 20, 8), (2, 3, 30, 8), {}),
    ],
)
def test_streamed_tensors_have_the_shapes_that_torch_takes(
    query: tuple[int, ...], key: tuple[int, ...], options: dict[str, Any]
) -> None:
    q, k, v = tensors(query, key, key)
    assert_as_torch(scaled_dot_product_attention(q, k, v, **options, **STREAMED), q, k, v, **options)


@pytest.mark.parametrize(("heads", "key", "value"), [(4, 1, 4), (4, 4, 1), (1, 1, 3)])
def test_one_head_of_key_or_value_goes_with_each_of_the_other(heads: int, key: int, value: int) -> None:
    q, k, v = tensors(*((2, count, 20, 8) for count in (heads, key, value)))
    assert_as_torch(scaled_dot_product_attention(q, k, v, **STREAMED), q, k, v)


def test_tensors_need_not_be_contiguous() -> None:
    q, k, v = (tensor.transpose(1, 2) for tensor in tensors((1, 20, 2, 8), (1, 30, 2, 8), (1, 30, 2, 8)))
    assert_as_torch(
        scaled_dot_product_attention(q, k[..., ::3, :], v[..., ::3, :], **STREAMED), q, k[..., ::3, :], v[..., ::3, :]
    )


def test_a_band_at_any_offset_is_that_of_a_problem() -> None:
    for rows, keys, left, right in itertools.product((1, 5), (1, 6), (None, 0, 2, 8), (0, 2)):
        for offset in range(-7, 9):
            found = align(rows, keys, offset, left, right)
            expected = torch.zeros(rows, keys, dtype=torch.bool)
            for row, key in itertools.product(range(rows), range(keys)):
                expected[row, key] = (left is None or row + offset - left <= key) and key <= row + offset + right
            got = torch.zeros_like(expected)
            if found.rows:
                before, after = found.window_size
                mask = Mask.of(
                    found.rows, found.keys, causal=found.causal, left=before, right=None if found.causal else after
                )
                for row in range(found.rows):
                    for part in mask.key_ranges(row):
                        got[row, part.start : part.stop] = True
            assert torch.equal(got, expected), (rows, keys, offset, left, right)


def test_a_result_beyond_the_host_budget_lies_in_the_scratch_folder(
    fast_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tensor that comes back maps a file of that folder, and nothing is left there."""
    q, k, v = tensors((1, 2, 20, 8), (1, 1, 30, 8), (1, 1, 30, 8))
    places: list[Path] = []
    mapped, run_plan = torch.from_file, streaming.run_plan
    monkeypatch.setattr(torch, "from_file", lambda name, **rest: places.append(Path(name)) or mapped(name, **rest))
    monkeypatch.setattr(
        streaming,
        "run_plan",
        lambda plan, request, engine: places.append(request.paths.result) or run_plan(plan, request, engine),
    )
    monkeypatch.setattr(streaming, "_out_bytes", lambda problem: 1 << 50)  # as of a large one
    found = scaled_dot_product_attention(q, k, v, enable_gqa=True, scratch=fast_path, **STREAMED)
    assert [place.is_relative_to(fast_path) for place in places] == [True, True]
    assert not list(fast_path.iterdir())
    assert_as_torch(found, q, k, v, enable_gqa=True)


class OnGPU(torch.Tensor):
    """A tensor in host memory that says that it is on a GPU."""

    device = torch.device("cuda")
    dtype = property(lambda self: torch.float32)


def test_a_result_for_a_gpu_that_is_beyond_the_host_budget_comes_by_way_of_a_file(
    fast_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = tensors((1, 2, 20, 8), (1, 2, 30, 8), (1, 2, 30, 8))
    places: list[Path] = []
    mapped, to = torch.from_file, torch.Tensor.to
    monkeypatch.setattr(torch, "from_file", lambda name, **rest: places.append(Path(name)) or mapped(name, **rest))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, where: self if where == OnGPU.device else to(self, where))
    monkeypatch.setattr(streaming, "_out_bytes", lambda problem: 1 << 50)  # as of a large one
    given = [part.as_subclass(OnGPU) for part in (q, k, v)]
    found = streaming.stream(*given, ProblemOptions(), streaming.Budgets(1, None, fast_path))
    assert [place.is_relative_to(fast_path) for place in places] == [True]
    assert_as_torch(found, q, k, v)


def streamed(q: torch.Tensor) -> torch.Tensor:
    return scaled_dot_product_attention(q, q, q, **STREAMED)


REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "mask": (
        lambda q: scaled_dot_product_attention(q, q, q, torch.ones(20, 20, dtype=torch.bool)),
        "attn_mask: .* is_causal",
    ),
    "dropout": (
        lambda q: scaled_dot_product_attention(q, q, q, dropout_p=0.1),
        r"dropout_p = 0.1 .float.: expected 0.0, for there is no",
    ),
    "dtype": (lambda q: scaled_dot_product_attention(*[q.double()] * 3, **STREAMED), "'q' has dtype float64: expected"),
    "dtypes": (lambda q: scaled_dot_product_attention(q, q.half(), q.half(), **STREAMED), "'k' has dtype float16: expected"),
    "heads": (lambda q: scaled_dot_product_attention(q, q[:, :3], q[:, :3], **STREAMED), "4 heads .* has 3: expected"),
    "value's heads": (lambda q: scaled_dot_product_attention(q, q, q[:, :2], **STREAMED), "4 heads and value .* has 2: exp"),
    "batches": (lambda q: scaled_dot_product_attention(q, *[q[:1].expand(3, -1, -1, -1)] * 2, **STREAMED), "other batches"),
    "keys": (lambda q: scaled_dot_product_attention(q, q, q[:, :, :9], **STREAMED), "'v' has shape"),
    "array": (lambda q: scaled_dot_product_attention(q.numpy(), q, q), "query = .* a tensor of PyTorch"),
    "budget": (lambda q: scaled_dot_product_attention(q, q, q, device_memory="few"), "device_memory 'few'"),
    "scratch": (lambda q: scaled_dot_product_attention(q, q, q, scratch=5), "scratch = 5 .int.: expected"),
    "folder": (lambda q: scaled_dot_product_attention(q, q, q, scratch="/etc/passwd"), "/etc/passwd is no folder"),
    "home": (lambda q: scaled_dot_product_attention(q, q, q, scratch="~/nowhere"), "scratch: /.*/nowhere is no folder"),
    "no path": (lambda q: scaled_dot_product_attention(q, q, q, scratch="a\0"), "is no path"),
    "causal": (lambda q: scaled_dot_product_attention(q, q, q, is_causal="x"), "is_causal = 'x' .str.: expected True"),
    "grouped": (lambda q: scaled_dot_product_attention(q, q, q, enable_gqa=1), "enable_gqa = 1 .int.: expected True"),
    "dropouts": (lambda q: scaled_dot_product_attention(q, q, q, dropout_p=torch.zeros(2)), "no dropout"),
    "quantised": (lambda q: streamed(torch.quantize_per_tensor(q, 0.1, 0, torch.qint8)), "query: .* give query.dequantize"),
    "vmap": (lambda q: torch.vmap(streamed)(q[None]), "within a transform of torch.func"),
    "jvp": (lambda q: torch.func.jvp(streamed, (q,), (q,)), "within a transform of torch.func"),
    "traced": (lambda q: torch.jit.trace(streamed, q), "stands for a tensor of a program"),
    "fake": (lambda q: streamed(FakeTensorMode().from_tensor(q)), "stands for a tensor of a program"),
    "memory": (lambda q: scaled_dot_product_attention(q, q, q, host_memory="few"), "host_memory 'few'"),
    "host": (lambda q: scaled_dot_product_attention(q, q, q, host_memory=1, **STREAMED), "the smallest that works is"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(("call", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_computed_is_refused_by_name(call: Callable[..., Any], words: str) -> None:
    (q,) = tensors((2, 4, 20, 8))
    with pytest.raises((oocattn.ProblemError, oocattn.BudgetError), match=words):
        call(q)


def test_a_gradient_of_streamed_tensors_is_refused_and_none_is_needed_under_no_grad() -> None:
    (q,) = tensors((1, 2, 20, 8))
    leaf = q.clone().requires_grad_()
    with pytest.raises(oocattn.ProblemError, match=r"requires_grad.*torch.no_grad\(\)"):
        scaled_dot_product_attention(leaf, q, q, **STREAMED)
    with torch.no_grad():
        assert_as_torch(scaled_dot_product_attention(leaf, q, q, **STREAMED), q, q, q)
    scaled_dot_product_attention(leaf, q, q).sum().backward()  # torch's own call
    assert leaf.grad is not None


def test_a_tangent_is_not_lost() -> None:
    (q,) = tensors((1, 2, 20, 8))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(q, q)
        with pytest.raises(oocattn.ProblemError, match="has a tangent"):
            scaled_dot_product_attention(dual, q, q, **STREAMED)


def test_tensors_that_torch_alone_knows_go_to_torch() -> None:
    (q,) = tensors((2, 4, 20, 8))
    assert scaled_dot_product_attention(*[q.to("meta")] * 3, **STREAMED).is_meta
    nested = torch.nested.nested_tensor([q[0], q[1, :, :9]], layout=torch.strided)
    assert scaled_dot_product_attention(nested, nested, nested, **STREAMED).is_nested


def test_a_call_within_a_compiled_program_is_streamed_as_it_is() -> None:
    (q,) = tensors((1, 2, 20, 8))
    compiled = torch.compile(lambda q: 2 * streamed(q), backend="eager")
    assert torch.equal(compiled(q), 2 * streamed(q))


def test_autocast_gives_the_dtype_that_torch_gives() -> None:
    (q,) = tensors((1, 2, 20, 8))
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = functional.scaled_dot_product_attention(q, q, q), streamed(q)
    assert found.dtype is expected.dtype
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE[torch.bfloat16])


def test_autocast_takes_tensors_of_two_dtypes_as_torch_does() -> None:
    (q,) = tensors((1, 2, 20, 8))
    with torch.autocast("cpu", torch.bfloat16):
        found = scaled_dot_product_attention(q, q, q.bfloat16(), **STREAMED)
        expected = functional.scaled_dot_product_attention(q, q, q.bfloat16())
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE[torch.bfloat16])


def test_a_call_leaves_the_random_numbers_of_torch_alone() -> None:
    q, k, v = tensors((1, 1, 20, 24), (1, 1, 30, 24), (1, 1, 30, 24))  # a shape whose kernel was not timed yet
    before = torch.get_rng_state()
    scaled_dot_product_attention(q, k, v, **STREAMED)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_small_call_takes_at_most_50_microseconds_longer_than_torch() -> None:
    (q,) = tensors((1, 1, 4, 8))

    def microseconds(call: Callable[..., torch.Tensor]) -> float:
        start = time.thread_time()
        call(q, q, q, is_causal=True)
        return 1e6 * (time.thread_time() - start)

    calls = [scaled_dot_product_attention, functional.scaled_dot_product_attention]
    ours, theirs = (
        median(rounds) for rounds in zip(*([microseconds(call) for call in calls] for _ in range(301)), strict=True)
    )
    assert ours - theirs < 50


@pytest.mark.gpu
@pytest.mark.parametrize("where", ["host", "cuda"])
def test_tensors_are_streamed_through_a_gpu_within_its_budget(where: str) -> None:
    q, k, v = (part.pin_memory() for part in tensors(*[(1, 8, 1 << 17, 64)] * 3, dtype=torch.float16))
    there = [part.cuda() for part in (q, k, v)]
    expected = functional.scaled_dot_product_attention(*there, is_causal=True)
    given = [q, k, v] if where == "host" else there
    found = scaled_dot_product_attention(*given, is_causal=True, device_memory="400MiB")
    assert found.device == given[0].device
    torch.testing.assert_close(found.cuda(), expected, rtol=0, atol=5e-3)
