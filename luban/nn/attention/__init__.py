"""How attention is computed: masks made ready for a kernel, kernels, and the backends that layers call."""
