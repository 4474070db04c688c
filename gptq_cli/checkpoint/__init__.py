"""Everything about a GPTQ directory: its format and layout, writing it, opening it, proving it sound."""
