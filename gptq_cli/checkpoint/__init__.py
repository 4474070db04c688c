"""Everything about a GPTQ directory: its format and layout, writing, opening and verifying it."""
