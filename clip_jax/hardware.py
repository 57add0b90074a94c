"""Chips and what they can do: peak bfloat16 FLOP/s of one JAX device, for the share of it that a run uses (MFU)."""

# TFLOP/s of dense bfloat16 per JAX device, by ``device.device_kind``. v2, v3 and 7x show two devices a chip.
# Source: cloud.google.com/tpu/docs (per-chip tables), NVIDIA data sheets (dense, without sparsity).
PEAK_BF16_TFLOPS = {
    "TPU v2": 22.5,
    "TPU v3": 61.5,
    "TPU v4": 275.0,
    "TPU v5 lite": 197.0,
    "TPU v5e": 197.0,
    "TPU v5": 459.0,
    "TPU v5p": 459.0,
    "TPU v6 lite": 918.0,
    "TPU v6e": 918.0,
    "TPU7x": 1153.5,
    "NVIDIA A100-SXM4-40GB": 312.0,
    "NVIDIA A100-SXM4-80GB": 312.0,
    "NVIDIA H100 80GB HBM3": 989.0,
    "NVIDIA H200": 989.0,
}


def peak_flops(device_kind: str) -> float | None:
    """FLOP/s of dense bfloat16 of one device, or None where the table has no entry (a CPU, a new chip)."""
    tflops = PEAK_BF16_TFLOPS.get(device_kind)
    return None if tflops is None else tflops * 1e12
