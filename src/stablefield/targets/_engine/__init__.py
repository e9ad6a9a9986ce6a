"""The computation of a posterior: from noisy rows and references to means, weights and variances.

A call goes through these modules in this order: `query` (the checked rows, and the plan of the call), `assembly` (which
combines the parts of every posterior), `label_index` and `columns` (which references a row meets), `logits`, `matmul`,
`reference_matrix`, `online_softmax`.
"""
