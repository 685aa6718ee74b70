"""MixGRPO: GRPO on flow-matching models with a sliding window of stochastic steps."""
