"""torch's tensors: through either door, what autograd learns, and every kind that is refused."""

import warnings
from types import SimpleNamespace

import numpy as np
import pytest
from libraries import TorchLibrary
from tolerances import assert_alike

import cupy_headnorm
from cupy_headnorm import HeadNorm, rms_norm
from cupy_headnorm._arrays import dlpack, dtypes, find, views
from cupy_headnorm._arrays import torch as torch_arrays
from cupy_headnorm._arrays.layout import CPU, Device

torch = pytest.importorskip("torch")


DEVICES = [
    pytest.param("cpu"),
    pytest.param("cuda", marks=pytest.mark.gpu),
]


def test_versions_are_counted_without_torchs_private_function():
    without = SimpleNamespace(
        _C=SimpleNamespace(), empty=torch.empty, inference_mode=torch.inference_mode,
        autograd=torch.autograd,
    )  # fmt: skip
    arrays = torch.ones(3), torch.ones(2)
    for count, library in enumerate((torch, without), 1):
        torch_arrays._version_counter(library)(arrays)
        assert [x._version for x in arrays] == [count, count]


ANY = dtypes._allowed((*dtypes.DTYPES, dtypes.INT64), "any")


class Handing:
    """Hands on a tensor by DLPack alone; results are those of NumPy or CuPy."""

    def __init__(self, x):
        self.x = x
        self.__dlpack_device__ = x.__dlpack_device__

    def __dlpack__(self, **options):
        return self.x.__dlpack__(**options)

    def __array_namespace__(self):
        return np if self.x.device.type == "cpu" else pytest.importorskip("cupy")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("way", ["attributes", "capsule"])
def test_torch_through_either_door(device, way, dtype, rng):
    values = rng.standard_normal((5, 6, 64)).astype(dtype.numpy)
    x = TorchLibrary(device).array(values)[:, ::2]
    expected = cupy_headnorm.reference.rms_norm(values[:, ::2])
    if way == "capsule":
        if device == "cpu" and dtype.name == "bfloat16":
            with pytest.raises(TypeError, match="x is a bfloat16 Handing on the host"):
                rms_norm(Handing(x))
            return
        y = rms_norm(Handing(x))
        assert type(y).__module__.partition(".")[0] == ("numpy" if device == "cpu" else "cupy")
        assert_alike(y if device == "cpu" else y.get(), expected)
        return
    assert_alike(TorchLibrary(device).host(rms_norm(x)), expected)
    pointer = x.data_ptr()
    assert rms_norm(x, out=x) is x
    assert x.data_ptr() == pointer
    assert find.view(x, "x").pointer == pointer


def test_attributes_tell_what_a_capsule_does(rng):
    """Of all layouts: with gaps, of one element, of none, broadcast, with a step of any length."""
    base = torch.from_numpy(rng.standard_normal((6, 5, 8)).astype(np.float32))
    arrays = [
        base, base[1:, ::2], base[..., 3], base[0, 0, 0], base[6:], base[:, :0], base.mT,
        base[:1].expand(4, 5, 8), base.as_strided((1, 8), (77, 1)), base.to(torch.float64),
        torch.nn.Parameter(base[2:]), base.long(),
    ]  # fmt: skip
    with torch.no_grad():
        for x in arrays:
            view = find.view(x, "x", ANY)
            raw = dlpack.read_capsule(x.detach().__dlpack__())
            told = views.view_of(raw, view.layout.dtype, "x", x, view.library)
            steps = [
                [step for n, step in zip(v.layout.shape, v.layout.strides, strict=True) if n > 1]
                for v in (view, told)
            ]  # a capsule of torch has 1 along an axis of length 1
            assert view.layout._replace(strides=()) == told.layout._replace(strides=())
            assert steps[0] == steps[1]
            assert view.pointer == told.pointer


def test_memory_of_other_devices_is_refused(monkeypatch):
    library = find.library_of(torch.ones(1), "x")

    def lying_on(kind):
        x = SimpleNamespace(device=SimpleNamespace(type=kind), get_device=lambda: 1)
        return library._device(x, "x")

    assert lying_on("cuda") == Device("cuda", 1)
    with pytest.raises(TypeError, match="x is in xpu memory; needs host or CUDA memory"):
        lying_on("xpu")
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert lying_on("cpu") == CPU
    with pytest.raises(TypeError, match="x is in ROCm memory; needs host or CUDA memory"):
        lying_on("cuda")


@pytest.mark.parametrize("device", DEVICES)
def test_torch_parameter_is_a_tensor(device):
    x = torch.nn.Parameter(torch.ones(3, 64, device=device))
    with torch.no_grad():
        y = rms_norm(x)
    assert type(y) is torch.Tensor
    assert not y.requires_grad


@pytest.mark.parametrize("device", DEVICES)
def test_torch_grad_is_refused(device):
    plain = torch.ones(3, 64, device=device)
    leaf = torch.ones(3, 64, device=device, requires_grad=True)
    for arrays, name in (((leaf,), "x"), ((plain, leaf[0].detach().requires_grad_()), "weight")):
        with pytest.raises(ValueError, match=rf"{name} requires grad .*torch.no_grad\(\)"):
            rms_norm(*arrays)
        with torch.no_grad():
            assert rms_norm(*arrays).shape == (3, 64)
    with pytest.raises(ValueError, match="out requires grad"):
        rms_norm(plain, out=leaf)
    assert (leaf == 1).all()
    with torch.inference_mode():
        rms_norm(leaf)


class Subclass(torch.Tensor):
    pass


def dual():
    with torch.autograd.forward_ad.dual_level():
        yield torch.autograd.forward_ad.make_dual(torch.ones(3, 64), torch.ones(3, 64))


def functional():
    yield torch._to_functional_tensor(torch.ones(3, 64))


def fake():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        tensor = torch.ones(3, 64)
    yield tensor


def nested():
    with warnings.catch_warnings(action="ignore"):
        yield torch.nested.nested_tensor([torch.ones(2, 64), torch.ones(3, 64)])


KINDS = {
    "nested": (nested, "is nested"),
    "subclass": (lambda: iter([torch.ones(3, 64).as_subclass(Subclass)]), "is a Subclass, a subcl"),
    "fake": (fake, "is a FakeTensor, a subclass of torch.Tensor"),
    "sparse": (lambda: iter([torch.ones(3, 64).to_sparse()]), "is of layout torch.sparse_coo"),
    "meta": (lambda: iter([torch.ones(3, 64, device="meta")]), "on the meta device, without mem"),
    "negated": (lambda: iter([torch.ones(3, 64, dtype=torch.cfloat).conj().imag]), "lazily negat"),
    "conjugated": (lambda: iter([torch.ones(3, 64, dtype=torch.cfloat).conj()]), "lazily conj"),
    "zero": (lambda: iter([torch._efficientzerotensor((3, 64))]), "a zero tensor without memory"),
    "dual": (dual, "a forward-mode AD dual"),
    "functional": (functional, "functional, without memory of its own"),
    "float8": (
        lambda: iter([torch.ones(3, 64).to(torch.float8_e4m3fn)]),
        "dtype float8_e4m3fn; needs float16",
    ),
    "int8": (lambda: iter([torch.ones(3, 64, dtype=torch.int8)]), "dtype int8; needs float16"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_torch_tensors_that_are_refused(kind):
    make, message = KINDS[kind]
    plain = torch.ones(3, 64)
    for tensor in make():
        with pytest.raises(TypeError, match=f"x is .*{message}|x {message}|x has {message}"):
            rms_norm(tensor)
        with pytest.raises(TypeError, match=f"out is .*{message}|out {message}|out has {message}"):
            rms_norm(plain, out=tensor)


def test_quantized_tensors_are_refused(monkeypatch):
    """torch makes no new ones since 2.13: let a plain tensor say that it is one."""
    monkeypatch.setattr(torch.Tensor, "is_quantized", True)
    with pytest.raises(TypeError, match="x is quantized; needs a strided tensor with memory"):
        rms_norm(torch.ones(3, 64))


def test_torch_func_transforms_are_refused():
    with pytest.raises(TypeError, match="x is inside a torch.func transform"):
        torch.vmap(rms_norm)(torch.ones(2, 3, 64))
    with pytest.raises(TypeError, match="x is inside a torch.func transform"):
        torch.func.grad(lambda x: rms_norm(x).sum())(torch.ones(3, 64))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", ["no_grad", "inference_mode"])
def test_autograd_learns_that_out_was_written(device, mode):
    x = torch.ones(3, 64, device=device)
    leaf = torch.ones(3, 64, device=device, requires_grad=True)
    loss = (leaf * x).sum()
    version = x._version
    rms_norm(x, out=x)
    assert x._version == version + 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    # As torch's own in-place functions do, also where no gradient is being recorded.
    y = torch.full((3, 64), 3.0, device=device)
    loss = (leaf * y).sum()
    mode = torch.no_grad if mode == "no_grad" else torch.inference_mode
    with mode():
        rms_norm(y, out=y)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: np.ma.masked_array(np.ones(64), np.arange(64) > 3), "weight is a MaskedArray"),
        (lambda: torch.ones(64, device="meta"), "weight is on the meta device"),
        (lambda: torch.ones(64).to_sparse(), "weight is of layout torch.sparse_coo"),
        (lambda: torch.ones(64, dtype=torch.int32), "weight has dtype int32"),
        (lambda: torch.ones(64).as_subclass(Subclass), "weight is a Subclass"),
    ],
)
def test_weights_of_a_headnorm_that_are_refused(make, message):
    with pytest.raises(TypeError, match=message):
        HeadNorm(make())


def test_inference_tensors_work():
    with torch.inference_mode():
        x = torch.ones(3, 64)
        rms_norm(x, out=x)
    assert rms_norm(x).shape == (3, 64)


@pytest.mark.parametrize("device", DEVICES)
def test_forward_reference_under_a_default_device(device):
    x = torch.ones(3, 64, device=device)
    with torch.device("meta" if device == "cpu" else "cuda"):
        y = HeadNorm(np.ones(64, np.float32)).forward_reference(x)
    assert y.device.type == device
    assert_alike(y.cpu().numpy(), cupy_headnorm.reference.rms_norm(np.ones((3, 64), np.float32)))


@pytest.mark.parametrize("device", DEVICES)
def test_headnorm_takes_a_snapshot_of_a_torch_parameter(device):
    layer = torch.nn.RMSNorm(64, device=device, dtype=torch.bfloat16)
    norm = HeadNorm(layer.weight, eps=1e-6)
    x = torch.randn(5, 3, 64, device=device, dtype=torch.bfloat16)
    before = norm(x)
    with torch.no_grad():
        layer.weight.fill_(7)
    assert torch.equal(norm(x), before)
    assert (norm.weight == 1).all()
