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
# # SciPy's solvers on a curvature
#
# **Question.** SciPy has solvers for eigenvalues, indefinite systems and trust regions that took decades to get right.
# Can they run on the Hessian of a network, which is never written down?
#
# Any operator becomes a SciPy one by `to_scipy()`: NumPy vectors in and out, and the same products behind.

# %%
import matplotlib.pyplot as plt
import numpy as np
import scipy.optimize
import scipy.sparse.linalg as spla
import torch
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import curvops as co
from curvops.report.digits import digits, network, train

data, test = digits()
model = network()
train(model, "classification", data, delta=1.0)
hessian = co.Hessian(model, "classification", data)
H = hessian.to_scipy()
print(hessian, "→", H)

# %% [markdown]
# ## Eigenvalues: `eigsh` and `lobpcg`
#
# ARPACK and LOBPCG are two algorithms with nothing in common but the product, and agree.

# %%
arpack = spla.eigsh(H, k=4, which="LA", return_eigenvectors=False)[::-1]
start = np.random.default_rng(0).standard_normal((H.shape[0], 8))
lobpcg = np.sort(spla.lobpcg(H, start, largest=True, maxiter=100, tol=1e-5)[0])[::-1][:4]
print("eigsh :", np.round(arpack, 6))
print("lobpcg:", np.round(lobpcg, 6))
smallest = spla.eigsh(H, k=1, which="SA", return_eigenvectors=False, ncv=80)[0]
print(f"smallest eigenvalue: {smallest:.4f}: the Hessian is indefinite")

# %% [markdown]
# ## An indefinite system: `minres`
#
# Conjugate gradients assume a definite matrix; MINRES (Paige and Saunders 1975) does not. The shift 0.1 lies inside the
# negative part of the spectrum, so that H + 0.1·I has eigenvalues on both sides of zero and close to it: a hard system.

# %%
shifted = hessian.add_diagonal(0.1)
S = shifted.to_scipy()
b = np.random.default_rng(1).standard_normal(H.shape[0])
iterations, residuals = [0], [1.0]


counter = iter(range(1, 100_000))


def record(x):
    if (number := next(counter)) % 50 == 0:
        iterations.append(number)
        residuals.append(np.linalg.norm(b - S @ x) / np.linalg.norm(b))


x, status = spla.minres(S, b, rtol=1e-7, maxiter=8000, callback=record)
print(f"scipy: status {status} (converged), true relative residual {np.linalg.norm(b - S @ x) / np.linalg.norm(b):.1e}")

ours, report = shifted.solve(torch.from_numpy(b), co.MINRES(rtol=1e-4), return_report=True)
print(f"curvops: {report.iterations} iterations, true relative residual {report.worst_residual:.1e}")

# %% [markdown]
# SciPy's test compares the residual with ‖A‖‖x‖, which is large where the system is nearly singular, and so declares
# success early. It is worth recomputing a residual; `solve` of an operator does, and raises where it is too large.

# %%
figure, ax = plt.subplots(figsize=(7, 3.8), layout="constrained")
ax.semilogy(iterations, residuals, color="#20639b")
ax.axhline(report.worst_residual, color="#d1622b", linestyle=(0, (4, 3)), label="where curvops' MINRES stopped")
ax.legend(frameon=False)
ax.set_xlabel("iteration of scipy.sparse.linalg.minres")
ax.set_ylabel("true relative residual")
ax.grid(True, color="#e4e6e8", linewidth=0.7)
ax.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# ## Training by second order: `trust-krylov`
#
# `scipy.optimize.minimize` asks for the objective, its gradient and Hessian products. The objective is the negative log
# posterior, loss + ½ δ ‖θ‖². An operator belongs to the weights it was built on (it refuses to answer for others), so that
# a new one is built at every point; building costs next to nothing.

# %%
delta = 1.0
x_train, y_train = data
fresh = network(seed=0)
start = parameters_to_vector(fresh.parameters()).detach().numpy().copy()
at = {"theta": None, "operator": None}


def place(theta):
    vector_to_parameters(torch.from_numpy(theta.copy()), fresh.parameters())


def objective(theta):
    place(theta)
    loss = torch.nn.functional.cross_entropy(fresh(x_train), y_train, reduction="sum")
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(fresh.parameters()))]).numpy()
    return float(loss.detach()) + 0.5 * delta * theta @ theta, gradient + delta * theta


def hessian_product(theta, v):
    place(theta)
    if at["theta"] is None or not np.array_equal(at["theta"], theta):
        at.update(theta=theta.copy(), operator=co.Hessian(fresh, "classification", data).add_diagonal(delta))
        counts["operators"] += 1
    counts["products"] += 1
    return (at["operator"] @ torch.from_numpy(np.array(v))).numpy()


counts = {"operators": 0, "products": 0}
paths = {"trust-krylov": [], "L-BFGS-B": []}
for method, path in paths.items():
    options = {"hessp": hessian_product} if method == "trust-krylov" else {"options": {"maxiter": 400}}

    def note(theta, path=path):
        path.append(np.linalg.norm(objective(theta)[1]))

    result = scipy.optimize.minimize(objective, start, jac=True, method=method, callback=note, **options)
    print(f"{method}: {result.nit} iterations, objective {result.fun:.6f}, gradient norm {path[-1]:.1e}")
print(f"trust-krylov built {counts['operators']} operators and took {counts['products']} Hessian products")

# %%
figure, ax = plt.subplots(figsize=(7, 3.8), layout="constrained")
for (method, path), colour in zip(paths.items(), ("#20639b", "#d1622b"), strict=True):
    ax.semilogy(range(1, len(path) + 1), path, color=colour, label=method)
ax.set_xscale("log")
ax.set_xlabel("iteration")
ax.set_ylabel("norm of the gradient")
ax.grid(True, color="#e4e6e8", linewidth=0.7)
ax.legend(frameon=False)
ax.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# **Answer.** Yes. Two unrelated eigensolvers agree to all digits shown; MINRES runs on the indefinite Hessian, and teaches
# to recompute its residual; `trust-krylov` trains the network with exact Hessian products, and after a long stretch
# of slow progress falls to a gradient of 1e-8 within a few iterations, where L-BFGS after twice as many iterations still
# has one of order one (its iterations are cheaper: they take gradients alone). Nothing had more than a few vectors of P numbers in memory.
