"""An emulation of NVIDIA GPUs, which runs PTX on the CPU. See `docs/design/emulation.md`."""
