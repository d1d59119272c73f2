"""FlashAttention in Triton (Dao et al. 2022; Dao 2023): scores are never written to memory."""
