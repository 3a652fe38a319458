"""Vision-language models: BLIP-2, LLaVA, Flamingo, and what their lessons share."""
