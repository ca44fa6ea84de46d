"""Negatives chosen in the stream: the noise and its bits, the distribution drawn from, and what is left out."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import normalize

import contrastive_kernels as ck
from contrastive_kernels.backends import Backend, registry
from contrastive_kernels.draws import philox
from contrastive_kernels.panels.terms import EXPONENTIAL, MAXIMUM, SEARCHES, SIGMOID
from contrastive_kernels.planning.costs import SEARCH_SPECS

BACKENDS = [name for name in ("cpu", "torch") if ck.why_not(name, torch.zeros(1, 1)) is None]
SMALL = 2**18  # several panels, of either backend


def features(n, m=None, d=16, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [normalize(torch.randn(k, d, generator=g), dim=1).to(dtype) for k in (n, m or n)]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def chi_square_limit(freedom, sigmas=5.0):
    """A bound that honest samples pass but for one in millions (Wilson and Hilferty)."""
    return freedom * (1 - 2 / (9 * freedom) + sigmas * math.sqrt(2 / (9 * freedom))) ** 3


# ---- the noise ----


@pytest.mark.parametrize(
    "counter, key, words",
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        ([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0],
         [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]),
    ],
)  # fmt: skip
def test_philox_known_answers(counter, key, words):
    """The published test vectors of Philox4x32-10."""
    result = philox.philox(*(tuple(torch.tensor([word]) for word in part) for part in (counter, key)))
    assert [int(word) for word in result] == words


def test_words_are_those_of_the_documented_counter():
    seed = torch.tensor([-(2**40) + 12345])
    block = philox.words(seed, slice(70, 73), slice(5, 18))
    key = tuple(torch.tensor([part]) for part in (int(seed) & 0xFFFFFFFF, (int(seed) >> 32) & 0xFFFFFFFF))
    for i in range(3):
        for j in range(13):
            row, column = 70 + i, 5 + j
            counter = tuple(torch.tensor([word]) for word in (column // 4, row, 0, 0))
            assert block[i, j] == philox.philox(counter, key)[column % 4]
    # any block is a part of a larger one
    assert torch.equal(block, philox.words(seed, slice(0, 80), slice(0, 64))[70:73, 5:18])


def bits_of(words):
    return (words.flatten()[:, None] >> torch.arange(32)) & 1


def test_words_are_uniform_and_independent():
    """Bits, bytes, and pairs of neighbours by row, by column and by seed."""
    words = philox.words(torch.tensor([7]), slice(0, 256), slice(0, 256))
    assert words.min() >= 0 and words.max() < 2**32
    n = words.numel()
    ones = bits_of(words).sum(0).double()
    assert ((ones - n / 2).abs() < 5 * math.sqrt(n) / 2).all()
    others = {
        "row": words.roll(1, 0),
        "column": words.roll(1, 1),
        "group": words.roll(4, 1),
        "seed": philox.words(torch.tensor([8]), slice(0, 256), slice(0, 256)),
        "high seed": philox.words(torch.tensor([7 + 2**32]), slice(0, 256), slice(0, 256)),
    }
    for shift in (0, 12, 24):
        byte = (words >> shift) & 0xFF
        counts = torch.bincount(byte.flatten(), minlength=256).double()
        assert ((counts - n / 256).square() / (n / 256)).sum() < chi_square_limit(255)
        for name, other in others.items():
            pairs = 16 * (byte >> 4) + (((other >> shift) & 0xFF) >> 4)
            counts = torch.bincount(pairs.flatten(), minlength=256).double()
            assert ((counts - n / 256).square() / (n / 256)).sum() < chi_square_limit(255), name
    for name, other in others.items():
        flips = bits_of(words ^ other).double().mean(0)
        assert ((flips - 0.5).abs() < 5 / (2 * math.sqrt(n))).all(), name


def test_uniform_keeps_the_digits_of_small_numbers():
    word = torch.tensor([0, 1, 2**20, 2**31, 2**32 - 1])
    v = philox.uniform(word)
    assert v.dtype == torch.float32
    want = (word.double() + 0.5) / 2**32
    assert ((v.double() / want - 1).abs() < 1e-7).all()
    assert v[-1] == 1 - 2.0**-24, "below 1"
    noise = -torch.log(-torch.log1p(-v.double()))
    assert noise.isfinite().all() and noise.max() > 22


def test_noise_is_gumbel():
    """Kolmogorov and Smirnov; the mean is Euler's constant, the variance pi^2 / 6."""
    noise = philox.gumbel(torch.tensor([3]), slice(0, 200), slice(0, 500)).double().flatten()
    n = len(noise)
    cdf = torch.exp(-torch.exp(-noise.sort().values))
    assert (cdf - (torch.arange(n) + 0.5) / n).abs().max() < 1.95 / math.sqrt(n)
    assert noise.mean().item() == pytest.approx(0.57721566, abs=5 * 1.2825 / math.sqrt(n))
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, rel=0.02)


# ---- the distribution ----


@pytest.mark.parametrize("backend", BACKENDS)
def test_draws_follow_the_softmax(backend):
    """Chi-square: 20,000 equal rows draw among 12 candidates, of which two are left out."""
    n, scale = 20_000, 3.0
    x, y = features(1, 12, d=4)
    positives, ids = torch.full((n,), 5), (torch.zeros(n, dtype=torch.int64), torch.arange(12) - 9)
    index = ck.sample_negatives(
        x.repeat(n, 1), y, scale, positives=positives, exclude=ids, generator=seeded(), backend=backend
    )
    counts = torch.bincount(index, minlength=12).double()
    allowed = torch.ones(12, dtype=torch.bool)
    allowed[[5, 9]] = False
    assert (counts[~allowed] == 0).all()
    probability = torch.softmax((scale * x @ y.T)[0, allowed].double(), 0)
    statistic = ((counts[allowed] - n * probability).square() / (n * probability)).sum()
    assert statistic < chi_square_limit(9)
    # and not a uniform draw
    assert (counts[allowed] - n / 10).square().sum() / (n / 10) > 10 * chi_square_limit(9)


def test_rows_and_seeds_are_independent():
    """Joint counts of the draws of neighbouring rows, and of two seeds, factorise."""
    x, y = features(1, 4, d=4)
    draws = [
        ck.sample_negatives(
            x.repeat(20_000, 1), y, 2.0, positives=torch.full((20_000,), -1), generator=seeded(seed)
        )
        for seed in (0, 1)
    ]  # fmt: skip
    for a, b in ((draws[0][::2], draws[0][1::2]), (draws[0], draws[1])):
        joint = torch.bincount(4 * a + b, minlength=16).double().view(4, 4)
        expected = joint.sum(1, keepdim=True) * joint.sum(0) / len(a)
        assert ((joint - expected).square() / expected).sum() < chi_square_limit(9)


@pytest.mark.parametrize("scale, chosen", [(1e4, "hardest"), (-1e4, "easiest")])
def test_an_extreme_scale_leaves_nothing_to_chance(scale, chosen):
    x, y = features(30)
    scores = (x @ y.T).double()
    scores.fill_diagonal_(-torch.inf if scale > 0 else torch.inf)
    want = scores.argmax(1) if scale > 0 else scores.argmin(1)
    assert torch.equal(ck.sample_negatives(x, y, scale, generator=seeded()), want)


# ---- backends, panels, seeds ----


def test_backends_and_panels_draw_the_same():
    x, y = features(300, 517)
    positives = torch.arange(300) + 100
    ids = torch.arange(300) % 7, torch.arange(517) % 11
    draws = [
        ck.sample_negatives(
            x, y, 10.0, positives=positives, exclude=ids, generator=seeded(5), backend=backend, workspace_bytes=size
        )
        for backend in BACKENDS
        for size in (SMALL, 2**26)
    ]
    for other in draws[1:]:
        assert torch.equal(draws[0], other)
    noise = philox.gumbel(torch.randint(-(2**63), 2**63 - 1, (1,), generator=seeded(5)), slice(0, 300), slice(0, 517))
    z = 10 * (x @ y.T) + noise
    z[ids[0][:, None] == ids[1]] = -torch.inf
    z[torch.arange(300), positives] = -torch.inf
    assert torch.equal(draws[0], z.argmax(1)), "exactly the documented noise"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype):
    x, y = features(150, 150, dtype=dtype)
    index = ck.sample_negatives(x, y, 8.0, generator=seeded(2), workspace_bytes=2 * SMALL)
    # the noise is the same, the scores are those of the rounded features
    assert torch.equal(index, ck.sample_negatives(x.float(), y.float(), 8.0, generator=seeded(2)))
    assert torch.equal(ck.hardest_negatives(x, y), ck.hardest_negatives(x.float(), y.float()))


def test_a_seed_decides():
    x, y = features(64)
    one, same, other = (ck.sample_negatives(x, y, 3.0, generator=seeded(s)) for s in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
    torch.manual_seed(0)
    first, second = (ck.sample_negatives(x, y, 3.0) for _ in range(2))
    torch.manual_seed(0)
    assert torch.equal(first, ck.sample_negatives(x, y, 3.0)) and not torch.equal(first, second)


def test_threads_do_not_show(set_threads):
    x, y = features(130, 300)
    results = []
    for threads in (1, 3):
        set_threads(threads)
        results.append(ck.sample_negatives(x, y, 3.0, generator=seeded()))
    assert torch.equal(*results)


def test_scale_may_be_a_parameter_and_features_may_train():
    x, y = (v.requires_grad_() for v in features(20))
    scale = torch.tensor(3.0, requires_grad=True)
    index = ck.sample_negatives(x, y, scale, generator=seeded())
    assert not index.requires_grad
    assert torch.equal(index, ck.sample_negatives(x, y, 3.0, generator=seeded()))
    assert torch.equal(
        ck.sample_negatives(3 * x, 2 * y, 3.0, normalize=True, generator=seeded()), index
    )  # fmt: skip


# ---- what is left out, and what is hardest ----


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [SMALL, 2**26])
def test_hardest_negatives(backend, size):
    x, y = features(130, 333)
    scores = x @ y.T
    options = {"backend": backend, "workspace_bytes": size}
    ids = torch.arange(130) % 5, torch.arange(333) % 9
    for positives, exclude in ((None, None), (203, None), (torch.arange(130) * 2 - 1, ids), (None, ids)):
        masked = scores.clone()
        columns = torch.arange(130) + (positives or 0) if not torch.is_tensor(positives) else positives
        masked[columns >= 0, columns[columns >= 0]] = -torch.inf
        if exclude is not None:
            masked[exclude[0][:, None] == exclude[1]] = -torch.inf
        ours = ck.hardest_negatives(x, y, positives=positives, exclude=exclude, **options)
        assert torch.equal(ours, masked.argmax(1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_candidate_is_minus_one(backend):
    x, y = features(3)
    options = {"backend": backend}
    assert ck.hardest_negatives(x[:1], y[:1], **options).tolist() == [-1]
    assert ck.sample_negatives(x[:1], y[:1], 1.0, **options).tolist() == [-1]
    same = torch.tensor([4, 4, 4])
    assert ck.sample_negatives(x, y, 1.0, exclude=same, **options).tolist() == [-1] * 3
    some = ck.hardest_negatives(x, y, exclude=torch.tensor([4, 4, 9]), **options)
    assert some[:2].tolist() == [2, 2] and some[2] in (0, 1)
    assert ck.hardest_negatives(x[:0], y, **options).shape == (0,)
    nobody = torch.full((3,), -1)
    assert ck.sample_negatives(x, y[:0], 1.0, positives=nobody, **options).tolist() == [-1] * 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_go_to_the_first(backend):
    x = torch.ones(200, 3)
    want = [1] + [0] * 199
    assert ck.hardest_negatives(x, x, backend=backend, workspace_bytes=SMALL).tolist() == want


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_is_never_chosen(backend):
    x, y = features(90, 170)
    y[::2] = torch.nan
    for index in (
        ck.sample_negatives(x, y, 5.0, backend=backend, workspace_bytes=SMALL),
        ck.hardest_negatives(x, y, backend=backend, workspace_bytes=SMALL),
    ):
        assert (index >= 0).all() and (index % 2 == 1).all()
    x[3] = torch.nan
    assert ck.hardest_negatives(x, y, backend=backend)[3] == -1


def test_layouts():
    """Transposed and strided features, and ids with gaps."""
    x, y = features(40, 60)
    want = ck.sample_negatives(x, y, 3.0, exclude=(torch.arange(40), torch.arange(60) % 40), generator=seeded())
    gaps = torch.arange(40).repeat_interleave(2)[::2], (torch.arange(60) % 40).int()
    ours = ck.sample_negatives(x.T.contiguous().T, y, 3.0, exclude=gaps, generator=seeded())
    assert torch.equal(ours, want)


class TestCompile:
    @pytest.fixture(autouse=True)
    def poison(self):
        """Off here: the compiler would trace it."""
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    def test_one_graph(self):
        def both(x, y, ids):
            return ck.sample_negatives(x, y, 3.0, exclude=ids), ck.hardest_negatives(x, y)

        compiled = torch.compile(both, fullgraph=True, dynamic=True, backend="aot_eager")
        for n in (20, 31):
            x, y = features(n)
            torch.manual_seed(0)
            want = both(x, y, torch.arange(n))
            torch.manual_seed(0)
            for a, b in zip(compiled(x, y, torch.arange(n)), want):
                assert torch.equal(a, b)

    @pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
    def test_opcheck(self):
        x, y = features(9, 12)
        exclude, params = torch.arange(9)[:, None], torch.tensor([2.0, 0.0])
        for seed in (None, torch.tensor([3])):
            ids = torch.arange(9), torch.arange(12)
            torch.library.opcheck(
                torch.ops.contrastive_kernels.best_column.default, (x, y, params, exclude, *ids, seed, "", 2**20)
            )
        bounds = torch.zeros(9)
        torch.library.opcheck(
            torch.ops.contrastive_kernels.count_ranks.default, (x, y, exclude, bounds, bounds, "", 2**20)
        )


# ---- backends that lack a term ----


def test_a_backend_says_which_terms_it_knows(monkeypatch, capsys):
    class Partial(type(registry.get("torch"))):
        name = "partial"
        terms = (EXPONENTIAL, SIGMOID, MAXIMUM)

    monkeypatch.setattr(registry, "ORDER", (Partial(), *registry.ORDER))
    x, y = features(20)
    assert ck.why_not("partial", x, y) is None
    assert ck.why_not("partial", x, y, loss="hardest_negatives") is None
    assert ck.why_not("partial", x, y, loss="sample_negatives") == "it has no gumbel_max term"
    with pytest.raises(ValueError, match=r"backend: 'partial' cannot serve .* it has no gumbel_max term"):
        ck.sample_negatives(x, y, 1.0, backend="partial")
    with pytest.raises(ValueError, match="it has no rank term"):
        ck.retrieval_metrics(x, y, backend="partial")
    assert torch.equal(ck.hardest_negatives(x, y, backend="partial"), ck.hardest_negatives(x, y))
    assert len(ck.sample_negatives(x, y, 1.0)) == 20, "unnamed, the next one serves"
    ck.explain(x, y, loss="sample_negatives")
    printed = capsys.readouterr().out
    assert "1 pass, 1 product " in printed and "it has no gumbel_max term" in printed


def test_every_function_that_searches_is_registered():
    assert {spec.term for spec in SEARCH_SPECS.values()} == set(SEARCHES)
    assert all(callable(getattr(ck, name)) for name in SEARCH_SPECS)
    for backend in registry.ORDER:
        able = type(backend).search_panel is not Backend.search_panel
        assert able == bool(set(SEARCHES) & set(backend.terms)), backend.name
    assert set(SEARCHES) <= set(registry.ORDER[-1].terms), "the last one serves everything"


# ---- the C++ pass ----


def test_every_instruction_set_has_the_same_noise():
    extension = pytest.importorskip("contrastive_kernels._C", reason="no extension")
    seed, row, n = -(2**60) + 99, 1234, 5000
    for name in ("avx512", "avx2", "baseline"):
        try:
            extension.set_instruction_set(name)
        except ValueError:
            continue
        for first in (0, 1, 6, 2**33 + 3):
            ours = torch.empty(n)
            extension.gumbel_array(seed, row, first, ours.data_ptr(), n)
            words = philox.words(torch.tensor([seed]), slice(row, row + 1), slice(first, first + n))[0]
            exact = -torch.log(-torch.log1p(-philox.uniform(words).double()))
            assert ((ours.double() - exact).abs() < 3e-7 * exact.abs().clamp(min=1)).all()
    extension.set_instruction_set("auto")


# ---- refusals ----

X, Y, Z = torch.eye(4, 3), torch.eye(4, 3) + 0.5, torch.eye(6, 3)
LONG = torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    "name, expected, came, options",
    [
        ("exclude", "ids", "str", {"exclude": "positive"}),
        ("exclude", "integer", "float32", {"exclude": torch.zeros(4)}),
        ("exclude", "[4]", "[6]", {"exclude": torch.zeros(6, dtype=torch.int64)}),
        ("exclude", "[6]", "[4]", {"y": Z, "exclude": LONG}),
        ("exclude", "pair", "tuple", {"exclude": (LONG,)}),
        ("exclude", "device cpu", "meta", {"exclude": LONG.to("meta")}),
        ("positives", "indices in [-1, 4)", "[0, 4]", {"positives": LONG + torch.tensor([0, 0, 0, 4])}),
        ("positives", "shape [4]", "[6]", {"positives": torch.zeros(6, dtype=torch.int64)}),
        ("backend", "one of", "'fast'", {"backend": "fast"}),
        ("workspace_bytes", "at least", "5", {"workspace_bytes": 5}),
        ("x and y", "same number of features", "3 and 2", {"y": Y[:, :2]}),
    ],
)
def test_refusals(name, expected, came, options):
    options = dict(options)
    y = options.pop("y", Y)
    for call in (lambda **o: ck.hardest_negatives(X, y, **o), lambda **o: ck.sample_negatives(X, y, 1.0, **o)):
        with pytest.raises((TypeError, ValueError)) as caught:
            call(**options)
        message = str(caught.value)
        assert message.startswith(f"{name}: "), message
        asked, _, got = message.partition("got")
        assert expected in asked and came in got, message


def test_a_generator_is_a_generator():
    with pytest.raises(TypeError, match=r"generator: expected a torch.Generator or None; got int"):
        ck.sample_negatives(X, Y, 1.0, generator=3)
