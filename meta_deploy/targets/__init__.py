"""What runs a bundle: one module a target. A machine that only infers needs none of what builds."""
