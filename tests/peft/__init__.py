"""LoFiT and PEFT on one model."""
