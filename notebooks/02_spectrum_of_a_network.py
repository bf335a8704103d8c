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
# # The spectrum of a network
#
# **Question.** How is the curvature of a classifier distributed: how many directions are steep, how many flat, how many
# bend downwards? And what does training change?
#
# Two curvatures are compared, both of the negative log-likelihood summed over the data: the Hessian, which is exact, and
# the GGN, which leaves out the curvature of the network itself and so has no negative part.

# %%
import matplotlib.pyplot as plt

import curvops as co
from curvops import plot
from curvops.report.digits import digits, network, train

data, _ = digits()
models = {"at initialisation": network(seed=0), "after training": network(seed=0)}
train(models["after training"], "classification", data, delta=1.0)

curvatures = {
    when: {"GGN": co.GGN(model, "classification", data), "Hessian": co.Hessian(model, "classification", data)}
    for when, model in models.items()
}

# %% [markdown]
# ## Densities
#
# Each curve comes from 10 random vectors and 300 Lanczos steps from each. The height counts eigenvalues per decade, on an
# axis that is logarithmic in both directions and linear around zero. The bands are 95 % intervals over the random
# vectors. The ticks at the bottom are the twelve largest eigenvalues, found exactly.

# %%
spectra = {when: {name: A.spectrum(10, 300) for name, A in pair.items()} for when, pair in curvatures.items()}
tops = {when: {name: A.eigsh(12) for name, A in pair.items()} for when, pair in curvatures.items()}

figure, axes = plt.subplots(2, 1, figsize=(9, 8), sharex=True, layout="constrained")
for ax, when in zip(axes, models, strict=True):
    plot.spectrum(spectra[when], ax, pairs=tops[when], threshold=0.1)
    ax.set_title(f"{when.capitalize()}", loc="left")
axes[0].set_xlabel("")
axes[0].set_xlim(-3e3, 2e4)
plt.show()

# %% [markdown]
# ## The steep end
#
# An eigenvalue lies for certain within the residual of each value drawn; the residuals are too small to see.

# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
for ax, when in zip(axes, models, strict=True):
    plot.scree(tops[when], ax)
    ax.set_title(when.capitalize(), loc="left")
plt.show()

for when in models:
    values = tops[when]["GGN"].values.flip(0)
    ratios = (values[:-1] / values[1:]).tolist()
    print(f"{when}, each eigenvalue of the GGN over the next:", "  ".join(f"{ratio:.2f}" for ratio in ratios))

# %% [markdown]
# ## The bulk and the negative part
#
# `count` bounds how many eigenvalues lie in an interval, from the same Lanczos runs; `eigsh` finds the smallest one.

# %%
for when, pair in curvatures.items():
    flat = spectra[when]["GGN"].count((-1e9, 1.0))
    print(f"{when}: {flat.value:.0f} ± {flat.half_width:.0f} of the GGN's eigenvalues are below 1")
    negative = spectra[when]["Hessian"].count((-1e9, -0.1))
    smallest = pair["Hessian"].eigsh(1, which="SA")
    share = float(negative.value) / pair["Hessian"].shape[0]
    print(
        f"{when}: {negative.value:.0f} ± {negative.half_width:.0f} eigenvalues of the Hessian below −0.1 ({share:.0%}); "
        f"smallest {float(smallest.values[0]):.2f} (residual {float(smallest.residuals[0]):.0e})"
    )

# %% [markdown]
# **Answer.** *The steep end*: at initialisation C − 1 = 9 eigenvalues of the GGN stand apart, one for each class but one:
# the drop after the ninth is the largest between neighbours. Training lowers them to a third or so, and the drop after
# the ninth is then hardly larger than others. *The bulk*: after training about four fifths of the 1,210 directions of the
# GGN have a curvature below 1, the prior precision of this training; the data say little about them. *The negative part*:
# at initialisation about two fifths of the Hessian's eigenvalues are negative (the bound on that count is wide), as far
# down as −673, which the GGN does not see. Training to a mode of
# the posterior leaves none below −δ = −1: loss + ½ δ ‖θ‖² has no downward direction there, and the smallest, −0.98, is
# just inside.
