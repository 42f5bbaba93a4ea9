"""Speed and memory of this package, next to the reference's and to plain timm's.

Not installed: ``python -m benchmarks`` runs it in a checkout.
"""
