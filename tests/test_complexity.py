"""Size and cost against the published figures, the challenge's own counter, and memory worked out by hand."""

import json

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from helpers.complexity import LimitError, check_limits, count_complexity, enforce_limits, measure, table
from helpers.quantization import calibrate, convert, prepare
from models import get_model
from models.cp_resnet import CpResnet, CpResnetConfig
from models.layers.add import Add
from models.layers.conv_unit import ConvUnit
from models.layers.core import QuantConfig
from models.layers.fold import fold
from tests.conftest import GOLDEN

GOLDEN_COUNTS = json.loads((GOLDEN / "complexity.json").read_text())
CP_MOBILE_INPUT = (1, 256, 64)
# base_channels, channels_multiplier, expansion_rate: parameters, folded, MACs of the convolutions, folded by the rules
PUBLISHED_SIZES = {
    (8, 2.3, 3): (13_942, 13_330, 2_690_048, 2_869_504),
    (16, 2.3, 3): (39_868, 38_758, 8_431_616, 8_775_936),
    (24, 1.5, 2): (31_058, 30_106, 9_289_728, 9_638_144),
    (24, 2.3, 3): (77_314, 75_714, 17_136_640, 17_644_800),
    (32, 1.8, 2.1): (61_160, 59_806, 17_047_552, 17_522_944),
    (32, 2.3, 3): (126_952, 124_862, 28_889_088, 29_561_088),
    (32, 1.5, 3): (69_688, 68_030, 21_669_888, 22_286_592),
    (32, 3.0, 3): (215_608, 213_062, 40_120_320, 40_850_688),
    (32, 2.3, 2): (86_296, 84_750, 20_215_808, 20_715_776),
    (32, 2.3, 4): (167_608, 164_974, 37_562_368, 38_406_400),
    (40, 2.3, 3): (208_638, 205_946, 46_201_856, 47_052_032),
    (64, 1.6, 4): (374_064, 369_702, 110_673_920, 112_246_016),
}


def cp_mobile(size=(32, 2.3, 3), **options) -> nn.Module:
    base, multiplier, expansion = size
    return get_model(
        "cp_mobile", base_channels=base, channels_multiplier=multiplier, expansion_rate=expansion, **options
    )


def baseline() -> nn.Module:
    return get_model("dcase24_baseline")


@pytest.mark.parametrize("size", PUBLISHED_SIZES, ids=str)
def test_cp_mobile_has_the_published_size_and_cost(size):
    report = measure(cp_mobile(size), CP_MOBILE_INPUT)
    trained, folded = report.trained, report.folded
    assert (trained.n_parameters, folded.n_parameters, trained.arithmetic_macs, folded.macs) == PUBLISHED_SIZES[size]
    assert folded.arithmetic_macs == trained.arithmetic_macs


def test_every_layer_of_cp_mobile_has_the_published_cost():
    report = measure(cp_mobile(), CP_MOBILE_INPUT)
    assert report.trained.macs == 28_893_268
    rows = {layer.name: layer for layer in report.trained.layers}
    published = {
        "in_c.0": ((8, 128, 32), 88, 294_912),
        "stages.s1.b2.block.1": ((96, 32, 8), 864 + 192, 221_184),
        "stages.s2.b4.block.2": ((72, 16, 8), 6_912 + 144, 884_736),
        "stages.s3.b6.block.2": ((168, 16, 8), 36_288 + 336, 4_644_864),
        "feed_forward": ((10, 16, 8), 1_680 + 20, 215_040),
    }
    for unit, (shape, n_parameters, macs) in published.items():
        conv, norm = rows[f"{unit}.0"], rows[f"{unit}.1"]
        assert conv.output_shape == (1, *shape)
        assert conv.unit == norm.unit == unit
        assert conv.n_parameters + norm.n_parameters == n_parameters
        assert (conv.macs, norm.macs) == (macs, norm.n_parameters)
    response_norm = rows["stages.s1.b1.after_block_norm"]
    assert (response_norm.n_parameters, response_norm.macs) == (2, 0)  # gamma and beta are bare parameters
    folded = [layer for layer in report.folded.layers if layer.unit == "stages.s3.b6.block.2"]
    assert [(layer.kind, layer.n_parameters, layer.macs) for layer in folded] == [
        ("Conv2d", 36_288 + 168, (36_288 + 168) * 16 * 8)
    ]


def test_the_baseline_agrees_with_the_challenges_counter_layer_by_layer():
    cost = measure(baseline(), (1, 256, 65)).trained
    assert (cost.n_parameters, cost.macs) == (GOLDEN_COUNTS["total_params"], GOLDEN_COUNTS["total_macs"])
    ours = {layer.name: layer for layer in cost.layers}
    renamed = {"after_block_activation": "after_block_norm", "shortcut.0": "shortcut", "feed_forward.2": "pool"}
    compared = set()
    for leaf in GOLDEN_COUNTS["leaves"]:
        name = leaf["name"]
        if name.endswith("shortcut.1"):  # an empty container behind the pool
            continue
        for theirs, own in renamed.items():
            name = name.removesuffix(theirs) + own if name.endswith(theirs) else name
        layer = ours[name]
        assert (layer.n_parameters, layer.macs) == (leaf["params"], leaf["macs"]), name
        assert list(layer.input_shape) == leaf["input"], name
        n_output = 2 if name == "pool" else 4  # ours has no axes of length 1
        assert list(layer.output_shape) == leaf["output"][:n_output], name
        if leaf["type"] in ("Conv2d", "BatchNorm2d", "ReLU", "AvgPool2d"):
            assert layer.kind == leaf["type"].removesuffix("2d" * (layer.kind == "AvgPool")), name
        compared.add(name)
    assert set(ours) - compared == {f"stages.s{s}.b{b}.add" for s, b in ((1, 1), (1, 2), (1, 3), (2, 5))}


def test_the_baseline_has_the_published_rows_and_variants():
    model = baseline()
    cost = measure(model, (1, 256, 65)).trained
    for row in GOLDEN_COUNTS["readme_table"][:20]:  # units; the last three are single layers
        parts = [layer for layer in cost.layers if layer.unit == row["module"]]
        assert sum(layer.n_parameters for layer in parts) == row["params"]
        assert sum(layer.macs for layer in parts) == row["macs"]
    variants = GOLDEN_COUNTS["variants"]
    assert variants["batch4"]["total_macs"] == 4 * cost.macs  # ours is for one clip
    assert measure(model, (1, 256, 50)).trained.macs == variants["frames50"]["total_macs"]


@pytest.mark.parametrize(
    ("dtypes", "name"),
    [
        ((torch.float32, torch.float32), "float32"),
        ((torch.float16, torch.float16), "float16"),
        ((torch.bfloat16, torch.bfloat16), "bfloat16"),
        ((torch.float16, torch.float32), "in_c_float16_rest_float32"),
    ],
)
def test_bytes_are_those_of_the_stored_precision(dtypes, name):
    model = baseline().to(dtypes[1])
    model.in_c.to(dtypes[0])
    cost = measure(model, (1, 256, 65)).trained
    assert cost.parameter_bytes("stored") == GOLDEN_COUNTS["memory_bytes"][name]
    assert cost.parameter_bytes() == 61_148
    assert cost.parameter_bytes("fp16") == cost.parameter_bytes("bf16") == GOLDEN_COUNTS["memory_bytes"]["float16"]
    assert cost.macs == GOLDEN_COUNTS["macs_measured_on_half_copy"]
    assert next(model.stages.parameters()).dtype == dtypes[1]
    with pytest.raises(ValueError, match="int8, fp16, bf16, fp32"):
        cost.parameter_bytes("int3")


class Bare(nn.Module):
    def __init__(self, child: nn.Module | None = None):
        super().__init__()
        self.p = nn.Parameter(torch.zeros(16, 4))
        self.child = child

    def forward(self, x):
        x = x @ self.p
        return x if self.child is None else self.child(x)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1, bias=False)

    def forward(self, x):
        return self.conv(self.conv(x))


def pruned() -> nn.Module:
    conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
    mask = torch.zeros_like(conv.weight)
    mask.flatten()[::2] = 1
    return prune.custom_from_mask(conv, "weight", mask)


RULES = {
    "Conv2d(3,8,3,padding=1,bias=True)": lambda: nn.Conv2d(3, 8, 3, padding=1),
    "Conv2d(8,8,3,padding=1,groups=8,bias=False)": lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),
    "BatchNorm2d(8)": lambda: nn.BatchNorm2d(8),
    "Linear(16,4)": lambda: nn.Linear(16, 4),
    "Linear(16,4) on (1,20,16)": lambda: nn.Linear(16, 4),
    "GRU(16,8,batch_first)": lambda: nn.GRU(16, 8, batch_first=True),
    "AvgPool2d(3)": lambda: nn.AvgPool2d(3),
    "ReLU": lambda: nn.ReLU(),
    "LayerNorm(16)": lambda: nn.LayerNorm(16),
    "bare Parameter(16,4) used in a matmul": Bare,
    "bare Parameter(16,4) matmul + Linear(4,4,no bias) child": lambda: Bare(nn.Linear(4, 4, bias=False)),
    "Conv2d(3,8,3,padding=1,no bias) with a torch pruning mask, half zero": pruned,
    "one Conv2d(4,4,1,no bias) applied twice": Twice,
}


@pytest.mark.parametrize("name", GOLDEN_COUNTS["counting_rules"])
def test_the_counting_rules_are_the_challenges(name):
    rule = GOLDEN_COUNTS["counting_rules"][name]
    cost = measure(RULES[name](), tuple(rule["input"][1:])).trained
    assert (cost.n_parameters, cost.macs) == (rule["params"], rule["macs"])


def test_a_hidden_weight_takes_up_bytes_all_the_same():
    cost = measure(pruned(), (3, 10, 12)).trained
    assert (cost.n_parameters, cost.parameter_bytes(), cost.parameter_bytes("stored")) == (108, 216, 864)
    model = cp_mobile((8, 2.3, 3))
    prune.l1_unstructured(model.in_c[0][0], "weight", amount=9)
    report = measure(model, CP_MOBILE_INPUT)
    assert report.trained.n_parameters == 13_942 - 9
    assert report.folded.n_parameters == 13_330  # zeros now
    assert hasattr(model.in_c[0][0], "weight_mask")


def test_what_the_counter_overlooks_is_in_the_arithmetic():
    """A layer over a sequence costs its weights at every step; a function costs what a module costs."""
    assert count_complexity(nn.Linear(16, 4), (20, 16)).macs == 20 * 16 * 4
    report = measure(Bare(), (20, 16))
    assert (report.trained.macs, report.trained.arithmetic_macs) == (0, 20 * 16 * 4)
    assert "the challenge's counter overlooks 1,280 MACs" in table(report)
    assert "overlooks" not in table(measure(cp_mobile((8, 2.3, 3)), CP_MOBILE_INPUT))


def test_shared_parameters_and_those_that_only_functions_read_count_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.unused = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
            self.two.weight = self.one.weight

        def forward(self, x):
            return nn.functional.linear(self.two(self.one(x)), self.unused.weight)

    cost = measure(Tied(), (4,)).trained
    assert cost.n_parameters == 16 + 4 + 4 + 15
    assert cost.macs == 20 + 20
    assert cost.parameter_bytes("stored") == 4 * 39
    assert (cost.layers[-1].name, cost.layers[-1].output_shape, cost.layers[-1].macs) == ("unused", (), 0)


def test_integer_weights_are_parameters_though_torch_stores_them_as_buffers():
    class IntegerConv(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("weight", torch.ones(8, 3, 1, 1, dtype=torch.int8))
            self.register_buffer("bias", torch.ones(8, dtype=torch.float16))
            self.register_buffer("scale", torch.ones(8))

        def forward(self, x):
            return nn.functional.conv2d(x, self.weight.float(), self.bias)

    cost = measure(IntegerConv(), (3, 5, 5)).trained
    assert (cost.n_parameters, cost.macs, cost.parameter_bytes("stored")) == (32, 32 * 25, 24 + 16)


def test_an_integer_network_costs_what_the_folded_one_costs_and_one_in_between_is_refused():
    model = cp_mobile((8, 2.3, 3)).eval()
    prepared = prepare(model, QuantConfig(), torch.zeros(1, *CP_MOBILE_INPUT))
    with pytest.raises(ValueError, match="fake quantization"):
        measure(prepared, CP_MOBILE_INPUT)
    calibrate(prepared, lambda: [torch.linspace(-1, 1, 256 * 64).view(1, *CP_MOBILE_INPUT)])
    folded, integer = measure(model, CP_MOBILE_INPUT).folded, measure(convert(prepared), CP_MOBILE_INPUT).folded
    assert integer.macs == folded.macs
    assert integer.n_parameters == folded.n_parameters - 2 * 6  # gamma and beta became constants
    assert integer.stored_bytes < 1.1 * integer.n_parameters  # int8 weights, float16 biases


def test_cp_resnet_has_the_published_size_and_cost_and_folds():
    report = measure(CpResnet(CpResnetConfig()), (1, 256, 43))
    cost, folded = report.trained, report.folded
    assert (cost.n_parameters, cost.arithmetic_macs, cost.macs) == (127_684, 28_839_120, 28_840_396)
    n_channels = sum(m.num_features for m in CpResnet(CpResnetConfig()).modules() if isinstance(m, nn.BatchNorm2d))
    assert folded.n_parameters == 127_684 - n_channels  # two parameters of each norm became one bias
    assert folded.arithmetic_macs == cost.arithmetic_macs
    assert not any("BatchNorm" in layer.kind for layer in folded.layers)


def test_biases_that_folding_leaves_are_no_macs():
    """The 2024 baseline keeps the limit as the rules count it; its folded biases would take it over."""
    report = measure(baseline(), (1, 256, 65))
    assert (report.trained.macs, report.folded.macs) == (29_419_156, 30_216_768)
    assert check_limits(report) == []


class Branches(nn.Module):
    """Norms that must stay: of a result that is read twice, of a convolution called twice, of the answer itself."""

    def __init__(self):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
        self.conv2, self.norm2 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.conv3, self.norm3 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.conv4, self.norm4 = nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4)

    def forward(self, x):
        x = self.conv1(x)
        x = x + self.norm1(x)
        x = self.norm2(self.conv2(self.conv2(x)))
        x = self.norm4(self.conv4(x))  # folds
        last = self.conv3(x)
        return last, self.norm3(last)


def test_a_convolution_is_folded_only_where_its_norm_alone_reads_it():
    model = Branches().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.weight, 0.5, 2)
    example = torch.randn(2, 1, 8, 8)
    folded = fold(model, example)
    assert [name for name, module in folded.named_modules() if isinstance(module, nn.Identity)] == ["norm4"]
    for ours, plain in zip(folded(example), model(example), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (cp_mobile, CP_MOBILE_INPUT),
        (lambda: fold(cp_mobile()), CP_MOBILE_INPUT),
        (baseline, (1, 256, 65)),
        (lambda: CpResnet(CpResnetConfig()), (1, 256, 43)),
        (lambda: nn.Sequential(nn.Conv1d(3, 8, 5, stride=2), nn.ConvTranspose1d(8, 2, 3), nn.PReLU()), (3, 40)),
        (lambda: nn.LSTM(16, 8, batch_first=True, bidirectional=True), (20, 16)),
    ],
    ids=["cp_mobile", "folded", "baseline", "cp_resnet", "one dimension", "lstm"],
)
def test_agrees_with_torchinfo(build, shape):
    torchinfo = pytest.importorskip("torchinfo")
    model = build()
    cost = measure(model, shape).trained
    theirs = torchinfo.summary(model, (1, *shape), device="cpu", verbose=0)
    assert (cost.n_parameters, cost.macs) == (theirs.total_params, theirs.total_mult_adds)
    leaves = [(x.class_name, max(x.num_params, 0), x.macs) for x in theirs.summary_list if x.is_leaf_layer and x.macs]
    assert [(layer.kind, layer.n_parameters, layer.macs) for layer in cost.layers if layer.macs] == leaves


def peak(model: nn.Module, shape: tuple[int, ...] = (4, 8, 8)) -> int:
    return measure(model, shape).folded.peak_values


SIZE = 4 * 8 * 8  # of the input in the tests of memory


def test_memory_of_a_chain_is_input_and_output_of_the_dearest_layer():
    wide = nn.Sequential(nn.Conv2d(4, 8, 1), nn.ReLU(inplace=True), nn.Conv2d(8, 12, 1), nn.Conv2d(12, 1, 1))
    assert peak(wide) == (8 + 12) * 64
    assert peak(nn.Sequential(nn.ReLU())) == 2 * SIZE  # not in place
    assert peak(nn.Sequential(nn.ReLU(inplace=True))) == SIZE
    assert peak(nn.Sequential(nn.Flatten(), nn.Unflatten(1, (4, 64)))) == SIZE  # views


class Residual(nn.Module):
    """The input waits for the end of a branch that is 2 and 3 times as wide."""

    def __init__(self, with_module: bool):
        super().__init__()
        self.expand, self.middle, self.project = nn.Conv2d(4, 8, 1), nn.Conv2d(8, 12, 1), nn.Conv2d(12, 4, 1)
        self.add = Add() if with_module else torch.add

    def forward(self, x):
        return self.add(self.project(self.middle(self.expand(x))), x)


@pytest.mark.parametrize("with_module", [True, False])
def test_memory_includes_what_waits_for_a_residual_sum(with_module):
    report = measure(Residual(with_module), (4, 8, 8))
    alive = {layer.name: layer.peak_values for layer in report.folded.layers}
    assert alive["expand"] == (4 + 8) * 64
    assert alive["middle"] == (4 + 8 + 12) * 64
    assert alive["project"] == (4 + 12 + 4) * 64
    assert alive.get("add", 3 * SIZE) == 3 * SIZE
    assert (report.folded.peak_values, report.folded.peak_layer) == (24 * 64, "middle")
    assert (report.folded.peak_bytes("int8"), report.folded.peak_bytes("fp32")) == (24 * 64, 4 * 24 * 64)


def test_memory_of_several_branches_and_of_the_network_itself():
    class Concatenate(nn.Module):
        def forward(self, x):
            return torch.cat([x * 2, x * 3, x * 4], dim=1)

    report = measure(Concatenate(), (4, 8, 8))
    assert (report.folded.peak_values, report.folded.peak_layer) == (6 * SIZE, "")  # x was read for the last time
    assert "in the network itself" in table(report)


def test_memory_includes_an_input_that_is_read_late_and_an_output_that_is_made_early():
    class Late(nn.Module):
        def forward(self, x):
            return (torch.ones(1, 12, 8, 8) * 2).mean(dim=1, keepdim=True) + x

    class Early(nn.Module):
        def __init__(self):
            super().__init__()
            self.narrow, self.wide = nn.Conv2d(4, 3, 1), nn.Conv2d(4, 12, 1)

        def forward(self, x):
            y = self.narrow(x)
            self.wide(x)
            return y

    assert peak(Late()) == (4 + 12 + 12) * 64
    assert peak(Early()) == (4 + 3 + 12) * 64


def test_memory_of_cp_mobile_is_that_of_its_first_depthwise_layer():
    """Folded, with ReLUs in place: the block's input waits for the sum beside both tensors of 96 channels."""
    report = measure(cp_mobile(), CP_MOBILE_INPUT)
    assert report.folded.peak_bytes() == (32 + 96 + 96) * 64 * 16
    assert report.folded.peak_layer.startswith("stages.s1.b1.block.1.")
    blocks = {layer.name: layer.peak_values for layer in report.folded.layers}
    assert blocks["stages.s1.b2.shortcut"] == (32 * 64 * 16) + 2 * (32 * 32 * 8)


def test_measuring_leaves_the_network_and_the_random_numbers_alone():
    model = cp_mobile((8, 2.3, 3)).train()
    model.stages.s1.eval()  # a frozen part stays one
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    first, second = measure(model, CP_MOBILE_INPUT), measure(model, CP_MOBILE_INPUT)
    assert first == second
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_limits_apply_to_the_folded_network_and_the_precision():
    report = measure(cp_mobile(), CP_MOBILE_INPUT)
    assert check_limits(report) == []
    enforce_limits(report)
    assert check_limits(report, "fp16") == ["249,724 bytes of parameters at fp16, limit 128,000"]
    assert check_limits(report, "stored") == ["499,448 bytes of parameters at their stored precision, limit 128,000"]
    large = measure(cp_mobile((32, 3.0, 3)), CP_MOBILE_INPUT)
    assert check_limits(large) == [
        "213,062 bytes of parameters at int8, limit 128,000",
        "40,125,412 MACs for one clip, limit 30,000,000",
    ]
    with pytest.raises(LimitError, match=r"over the challenge's limits: 213,062 bytes .*; 40,125,412 MACs") as caught:
        enforce_limits(large)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("n_channels", "is_over"), [(128_000, False), (128_001, True)])
def test_the_limit_itself_is_allowed(n_channels, is_over):
    report = measure(nn.Conv1d(1, n_channels, 1, bias=False), (1, 1))
    assert bool(check_limits(report)) is is_over


def test_folding_brings_a_network_under_the_limit():
    """A unit's norm has two parameters for each channel, its bias afterwards one."""
    model = nn.Sequential(ConvUnit(1, 43_000, 1))
    report = measure(model, (1, 1, 1))
    assert report.trained.parameter_bytes() == 129_000
    assert report.folded.parameter_bytes() == 86_000
    assert check_limits(report) == []


def test_the_table_has_a_row_for_each_unit_and_aligned_columns():
    lines = table(measure(cp_mobile(), CP_MOBILE_INPUT)).splitlines()
    rows = lines[: lines.index("")]
    assert len({len(row) for row in rows}) == 1
    assert rows[1].split() == ["in_c.0", "ConvUnit", "8x128x32", "88", "80", "294,928", "327,680", "49,152"]
    assert rows[-1].split() == ["total", "126,952", "124,862", "28,893,268", "29,561,088", "229,376"]
    assert len(rows) == 2 + (2 + 6 * 3 + 1) + 6 + 4 + 4 + 1  # units, response norms, shortcuts, sums, pool
    assert lines[-1] == "within the limits at int8"
    assert "parameters, bytes: 124,862 at int8, 249,724 at fp16, 499,448 at fp32" in lines[-4]
