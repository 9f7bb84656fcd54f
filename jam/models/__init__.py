"""Networks: transformers' own decoder classes as towers, and the fused models that transformers cannot express."""
