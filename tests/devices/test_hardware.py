"""The chip table against published figures, and the names of slices against their chips, hosts and devices."""

import pytest

from clip_jax.devices import hardware
from clip_jax.devices.hardware import GIB, gpu, peak_flops, tpu
from clip_jax.errors import UserError

# accelerator type, chips, hosts, JAX devices, shape: cloud.google.com/tpu/docs and MaxText's table of slices
SLICES = [
    ("v2-8", 4, 1, 8, (2, 2)),
    ("v3-32", 16, 4, 32, (4, 4)),
    ("v3-2048", 1024, 256, 2048, (32, 32)),
    ("v4-8", 4, 1, 4, (2, 2, 1)),
    ("v4-512", 256, 64, 256, (4, 8, 8)),
    ("v4-4096", 2048, 512, 2048, (8, 16, 16)),
    ("v5litepod-1", 1, 1, 1, (1, 1)),
    ("v5litepod-8", 8, 1, 8, (2, 4)),
    ("v5litepod-16", 16, 4, 16, (4, 4)),
    ("v5litepod-256", 256, 64, 256, (16, 16)),
    ("v5p-8", 4, 1, 4, (2, 2, 1)),
    ("v5p-128", 64, 16, 64, (4, 4, 4)),
    ("v5p-12288", 6144, 1536, 6144, (16, 16, 24)),
    ("v6e-8", 8, 1, 8, (2, 4)),
    ("v6e-256", 256, 64, 256, (16, 16)),
    ("tpu7x-8", 4, 1, 8, (2, 2, 1)),
    ("tpu7x-128", 64, 16, 128, (4, 4, 4)),
]


@pytest.mark.parametrize(("name", "chips", "hosts", "devices", "shape"), SLICES, ids=lambda x: str(x))
def test_an_accelerator_type_has_these_chips_hosts_and_devices(name, chips, hosts, devices, shape):
    machines = tpu(name)
    assert (machines.chips, machines.hosts, machines.devices) == (chips, hosts, devices)
    assert machines.topology == shape
    assert machines.accelerator_type == name


# GiB, bfloat16 TFLOP/s, GB/s of HBM, and the published bidirectional ICI GB/s and DCN Gbit/s per chip
PUBLISHED = {
    "v2": (16, 45, 700, None, None),
    "v3": (32, 123, 900, None, None),
    "v4": (32, 275, 1200, None, None),
    "v5e": (16, 197, 819, 400, 25),
    "v5p": (96, 459, 2765, 1200, 50),
    "v6e": (32, 918, 1638, 800, 100),
    "7x": (192, 2307, 7380, 1200, 100),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_table_has_the_published_figures(name):
    chip = next(chip for chip in hardware.TPUS if chip.name == name)
    gib, tflops, hbm, ici, dcn = PUBLISHED[name]
    assert (chip.hbm, chip.flops, chip.hbm_bandwidth) == (gib * GIB, tflops * 1e12, hbm * 1e9)
    ports = 2 * len(next(iter(chip.topologies.values())))
    assert ici is None or 2 * ports * chip.link_bandwidth == ici * 1e9
    assert dcn is None or 8 * chip.network_bandwidth == dcn * 1e9
    assert 0.9 * chip.hbm < chip.free_hbm < chip.hbm


# bfloat16 TFLOP/s without sparsity, GB/s of memory and of NVLink (PCIe), both ways: NVIDIA's data sheets
DATA_SHEETS = {
    "a100-40gb": (312, 1555, 600),
    "a100": (312, 2039, 600),
    "h100": (989, 3350, 900),
    "h100-pcie": (756, 2000, 600),
    "h200": (989, 4800, 900),
    "b200": (2250, 7700, 1800),
    "l4": (121, 300, 64),
    "l40s": (362, 864, 64),
}


def test_the_gpus_have_the_figures_of_nvidias_data_sheets():
    found = {c.name: (c.flops / 1e12, c.hbm_bandwidth / 1e9, 2 * c.link_bandwidth / 1e9) for c in hardware.GPUS}
    assert found == DATA_SHEETS


# MiB by nvidia-smi, below the GiB of the name: ECC takes a sixteenth of GDDR6 (L4, L40S)
MEMORY = {
    "a100-40gb": 40_960,
    "a100": 81_920,
    "h100": 81_559,
    "h200": 143_771,
    "b200": 183_359,
    "l4": 23_034,
    "l40s": 46_068,
}


@pytest.mark.parametrize("name", MEMORY)
def test_a_gpu_has_the_memory_that_its_driver_reports_and_a_program_can_use_most_of_it(name):
    chip = gpu(name).chip
    assert chip.hbm == pytest.approx(MEMORY[name] * 2**20, rel=0.01)
    assert 0.9 * chip.hbm < chip.free_hbm < MEMORY[name] * 2**20


def test_all_reduce_bandwidth_of_a_pod_follows_from_its_links():
    # Published for v4 (1.1 PB/s, both ways) and v5e (51.2 TB/s): all links of all chips.
    for name, pod in (("v4-4096", 1.1e15 / 2), ("v5e-256", 51.2e12)):
        machines = tpu(name)
        assert machines.chips * machines.links * machines.chip.link_bandwidth == pytest.approx(pod, rel=0.02)


def test_every_generation_has_its_cloud_runtime_version():
    versions = {chip.name: chip.runtime_version for chip in hardware.TPUS}
    assert versions == {
        "v2": "tpu-ubuntu2204-base",
        "v3": "tpu-ubuntu2204-base",
        "v4": "tpu-ubuntu2204-base",
        "v5e": "v2-alpha-tpuv5-lite",
        "v5p": "v2-alpha-tpuv5",
        "v6e": "v2-alpha-tpuv6e",
        "7x": None,
    }


def test_v5e_and_v5litepod_are_synonyms():
    assert tpu("v5e-256") == tpu("V5litepod-256") == tpu("v5e:16x16")
    assert tpu("v5e-256").name == "v5e-256"


def test_several_slices_multiply_chips_and_need_a_network():
    two = tpu("v5e-256", slices=2)
    assert (two.chips, two.hosts, two.name) == (512, 128, "2 x v5e-256")
    with pytest.raises(UserError, match="v3 slices cannot be joined"):
        tpu("v3-8", slices=2)


def test_a_chip_has_one_link_along_an_axis_of_two_and_two_along_a_longer_one():
    assert [tpu(n).links for n in ("v5e-1", "v5e-4", "v5e-8", "v5e-256", "v4-8", "v4-512")] == [0, 2, 3, 4, 2, 6]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5e-255", "the nearest is v5e-256"),
        ("v4-500", r"counts cores.* nearest is v4-512"),
        ("v4-7", "nearest is v4-8"),
        ("v8-256", "no such TPU slice"),
        ("v5lite-256", "nearest: v5litepod-256"),
        ("v6-256", "nearest: v6e-256"),
        ("v5e:16x15", "it has 1x1, 2x2, 2x4"),
        ("", "no such TPU slice"),
    ],
)
def test_an_unknown_slice_is_rejected_with_the_nearest(name, message):
    with pytest.raises(UserError, match=message):
        tpu(name)


def test_a_gpu_name_has_a_kind_and_a_number():
    assert (gpu("h100:8").chips, gpu("h100:16").hosts, gpu("H200").chips) == (8, 2, 1)
    assert (gpu("h100:8").name, gpu("h100:16").name) == ("h100:8", "h100:16")
    assert (gpu("h100:8").links, gpu("h100:1").links, gpu("h100:16").slices) == (1, 0, 2)
    with pytest.raises(UserError, match="nearest: h100"):
        gpu("h10:8")
    with pytest.raises(UserError, match="must be positive"):
        gpu("h100:many")
    with pytest.raises(UserError, match="8 GPUs each; example: h100:8"):
        gpu("h100:9")


def test_peak_flops_is_per_jax_device():
    # v2, v3 and 7x have two devices per chip
    kinds = {"TPU v3": 61.5e12, "TPU v4": 275e12, "TPU v5 lite": 197e12, "TPU7x": 1153.5e12, "NVIDIA H200": 989e12}
    assert {kind: peak_flops(kind) for kind in kinds} == kinds
    assert peak_flops("cpu") is None
