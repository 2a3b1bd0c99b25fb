"""The STEP3-VL model on Megatron-Core parts."""
