# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A first operator
#
# **Question.** A curvature of a network with P parameters is a P × P matrix. What can be asked of it before anyone
# writes that matrix down, and what does each answer cost?
#
# The network is a small one on scikit-learn's digits, so that at the end the matrix can be looked at after all.

# %%
import matplotlib.pyplot as plt
import torch

import curvops as co
from curvops.report.digits import digits, network, train

(x, y), (x_test, y_test) = digits()
model = network()
train(model, "classification", (x, y), delta=1.0)
accuracy = float((model(x_test).argmax(1) == y_test).double().mean())
print(f"{accuracy:.1%} of the test digits are right")

# %% [markdown]
# ## Build
#
# Building reads the parameters once and runs nothing. One line says what an operator is; `describe` draws the tree.

# %%
G = co.GGN(model, "classification", (x, y))
F = co.EmpiricalFisher(model, "classification", (x, y))
H = co.Hessian(model, "classification", (x, y))
A = G.add_diagonal(1.0)

for operator in (G, F, H, A):
    print(operator)
print()
print(A.describe())
print("\nproducts so far:", G.matvec_count)

# %% [markdown]
# ## Ask
#
# `explain` names the algorithm that would answer, and why. Nothing runs yet.

# %%
for verb in ("solve", "logdet", "trace", "eigsh"):
    print(A.explain(verb))

# %% [markdown]
# Every answer can come with a report: which algorithm, how many products, how far off at most. Products are the unit of
# cost: one is about one and a half gradients of the loss over all data. Here the routes that need no matrix are asked
# for by name, since at P = 1,210 the automatic choice is often a factorisation.

# %%
b = torch.ones(G.shape[0], dtype=G.dtype)

_, solve = A.solve(b, return_report=True)
_, trace = G.trace(co.XTrace(), return_report=True)
_, logdet = A.logdet(co.SLQ(), return_report=True)
top, eigen = G.eigsh(5, return_report=True)

print(f"{'question':24}{'answer':>28}   products   algorithm")
print(f"{'A x = b':24}{f'residual {solve.worst_residual:.1e}':>28}{solve.matvecs:>11}   {solve.algorithm}")
print(f"{'tr G':24}{f'{trace.value:,.0f} ± {trace.half_width:.0f}':>28}{trace.matvecs:>11}   {trace.algorithm}")
print(f"{'log det A':24}{f'{logdet.value:.1f} ± {logdet.half_width:.1f}':>28}{logdet.matvecs:>11}   {logdet.algorithm}")
print(
    f"{'largest eigenvalue of G':24}{f'{top.values[-1]:.4f} ± {top.residuals[-1]:.0e}':>28}{eigen.matvecs:>11}   {eigen.algorithm}"
)

# %% [markdown]
# ## Algebra
#
# Operators add, scale, multiply and restrict, still lazily. A dictionary gives each parameter its own damping. The last
# layer's block is a submatrix.

# %%
damping = {"0.weight": 1.0, "0.bias": 0.1, "2.weight": 2.0, "2.bias": 0.1}
difference = H - G
last_layer = G.submatrix(torch.arange(1040, 1210))
for operator in (G.add_diagonal(damping), difference, last_layer, A.inverse()):
    print(operator)

v = torch.ones(G.shape[0], dtype=G.dtype)
print(f"\nv'(H - G)v / v'Gv = {float(difference.quadratic_form(v) / G.quadratic_form(v)):.3f}")

# %% [markdown]
# ## Materialise, at the end
#
# `to_dense` is the one road to the matrix, and refuses what does not fit into memory. The picture shows log₁₀ |entries|:
# the four blocks are the weights and biases of the two layers; the stripes in the first block are pixels that are blank
# in every digit.

# %%
M = G.to_dense()
figure, ax = plt.subplots(figsize=(6.2, 5.2), dpi=72, layout="constrained")
image = ax.imshow(M.abs().clamp(min=1e-6).log10(), cmap="magma", vmin=-3, interpolation="nearest")
edges = [0, 1024, 1040, 1200, 1210]
for edge in edges[1:-1]:
    ax.axhline(edge, color="white", linewidth=0.5)
    ax.axvline(edge, color="white", linewidth=0.5)
ax.set_xticks([512, 1120], ["first layer", "second layer"])
ax.set_yticks([512, 1120], ["first layer", "second layer"], rotation=90, va="center")
figure.colorbar(image, label="log₁₀ of the size of the entry")
ax.set_title("The GGN that was asked about, 1,210 × 1,210", loc="left")
plt.show()

A_dense = M + torch.eye(len(M), dtype=M.dtype)
print(
    f"log det A from the matrix: {float(torch.logdet(A_dense)):.1f}; estimated: {logdet.value:.1f} ± {logdet.half_width:.1f}"
)
print(f"tr G from the matrix: {float(M.trace()):,.0f}; estimated: {trace.value:,.0f} ± {trace.half_width:.0f}")

# %% [markdown]
# **Answer.** Everything that is usually done with the matrix: solves, traces, log-determinants, eigenvalues, sums and
# restrictions. Each costs tens to hundreds of products instead of the P = 1,210 that writing the matrix down takes, each
# says how far off it may be, and the matrix, once looked at, agrees.
