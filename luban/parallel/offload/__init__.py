"""Training state outside of the device: ZeRO-Offload's host memory, ZeRO-Infinity's disks."""
