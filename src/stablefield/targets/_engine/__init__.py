"""How a posterior is summed: from noisy rows and references to means, weights and variances.

A call goes through these modules in this order: `query` (the rows, checked, and the plan of the call), `assembly` (the
one place where a posterior is put together), `logits`, `matmul`, `reference_matrix`, `online_softmax`.
"""
