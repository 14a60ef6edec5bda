"""The section "Backward" of docs/computation.md, formula by formula, against automatic differentiation in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import saml_kernels
from saml_kernels.layers import STARMLP, MixtureOfExperts, MultiBranchMLP, PartitionedNorm, ScoreMixture

TOLERANCE = 1e-12
EPSILON = 1e-8


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def normal(*shape):
    return torch.randn(shape, dtype=torch.float64)


def assert_equal(formulas: dict[str, Tensor], expected: dict[str, Tensor]):
    """Relative error of every tensor; one that is exactly zero must be exactly zero."""
    assert formulas.keys() == expected.keys()
    for name, value in formulas.items():
        distance, size = (value - expected[name]).norm(), expected[name].norm()
        assert distance <= TOLERANCE * size, f"{name}: {distance / size:.1e}"


def sigmoid_of(z):
    return 1 / (1 + torch.exp(-z))


def derivative(activation, Z):
    """The table of δ'."""
    if activation in ("relu", "leaky_relu"):
        return torch.where(Z > 0, torch.ones_like(Z), 0.0 if activation == "relu" else 0.01)
    if activation == "tanh":
        return 1 - torch.tanh(Z) ** 2
    if activation == "identity":
        return torch.ones_like(Z)
    if activation == "silu":
        σ = sigmoid_of(Z)
        return σ * (1 + Z * (1 - σ))
    q = math.sqrt(2 / math.pi)
    h = torch.tanh(q * (Z + 0.044715 * Z**3))
    return (1 + h) / 2 + Z / 2 * (1 - h**2) * q * (1 + 3 * 0.044715 * Z**2)


DELTA = {
    "relu": F.relu,
    "leaky_relu": lambda z: F.leaky_relu(z, 0.01),
    "gelu": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
    "identity": lambda z: z,
}


@pytest.mark.parametrize("activation", DELTA)
def test_derivatives_of_the_activations(activation):
    Z = normal(200).requires_grad_()
    (expected,) = torch.autograd.grad(DELTA[activation](Z).sum(), Z)
    assert_equal({"δ'": derivative(activation, Z.detach())}, {"δ'": expected})


def weights_of_row(V, i, score, τ):
    """c_ij and α_ij of one row of the table, own entries 0; V (M, d)."""
    M = V.shape[0]
    n = V.norm(dim=1).clamp(min=EPSILON)
    c = V @ V[i] / (n * n[i])
    foreign = torch.arange(M) != i
    c = torch.where(foreign, c, 0)
    S = c.sum()
    if score == "softmax":
        argument = c / τ
    elif S.abs() < 1e-6:
        argument = torch.zeros_like(c)
    else:
        argument = c / S
    return c, torch.softmax(argument.masked_fill(~foreign, -math.inf), 0)


def mutual_forward(V, i, U, u, score, τ):
    if V.shape[0] == 1:
        return V[i]
    _, α = weights_of_row(V, i, score, τ)
    return V[i] + sigmoid_of(V[i] @ U[i] + u[i]) * (α @ V)


def mutual_backward(dM, V, t, U_t, u_t, score, τ):
    """dV_t, its part through the scores, dU_t and du_t of one row; V (M, d)."""
    if V.shape[0] == 1:
        return dM, torch.zeros_like(dM), torch.zeros_like(U_t), torch.zeros_like(u_t)
    V_t = V[t]
    c, α = weights_of_row(V, t, score, τ)
    g = sigmoid_of(V_t @ U_t + u_t)
    mix = α @ V
    V_hat = V / V.norm(dim=1, keepdim=True).clamp(min=EPSILON)
    n_t = V_t.norm().clamp(min=EPSILON)

    G = dM * g
    p = V @ G
    p_bar = α @ p
    dz_g = dM * mix * g * (1 - g)
    if U_t.shape[1] == 1:
        dz_g = (dM * mix * g * (1 - g)).sum().unsqueeze(0)
    dU = torch.outer(V_t, dz_g)
    du = dz_g
    r = α * (p - p_bar)
    S = c.sum()
    if score == "softmax":
        dc = r / τ
    elif S.abs() < 1e-6:
        dc = torch.zeros_like(c)
    else:
        dc = torch.where(torch.arange(len(c)) != t, r / S - (r @ c) / S**2, 0)
    long = float(V_t.norm() > EPSILON)
    through_scores = (dc @ V_hat - long * (dc @ c / n_t) * V_t) / n_t
    return dM + dz_g @ U_t.T + through_scores, through_scores, dU, du


@pytest.mark.parametrize("score", ["ratio", "softmax"])
@pytest.mark.parametrize("gate", ["vector", "scalar"])
@pytest.mark.parametrize(
    "case", ["random", "one scenario", "degenerate sum", "short own stream", "zero foreign stream"]
)
def test_mutual_unit(case, gate, score):
    τ, B, M, d = 0.3, 6, 1 if case == "one scenario" else 5, 7
    v, scenario = normal(B, M, d), torch.randint(0, M, (B,))
    if case == "degenerate sum":
        # Two foreign streams with opposite cosines to the own one: Σ c = 0.
        M, scenario = 3, torch.zeros(B, dtype=torch.int64)
        v = torch.zeros(B, M, d, dtype=torch.float64)
        v[:, 0, 0], v[:, 1, 0], v[:, 1, 1], v[:, 2, 0], v[:, 2, 2] = 1.5, 2.0, 1.0, -4.0, 2.0
    if case == "short own stream":
        v[torch.arange(B), scenario] *= 1e-10
    if case == "zero foreign stream":
        v[torch.arange(B), (scenario + 1) % M] = 0
    width = d if gate == "vector" else 1
    U, u, dM = normal(M, d, width), normal(M, width), normal(B, d)
    v, U, u = v.requires_grad_(), U.requires_grad_(), u.requires_grad_()
    out = saml_kernels.mutual_unit(v, scenario, U, u, score=score, temperature=τ, backend="reference")
    grad_v, grad_U, grad_u = torch.autograd.grad(out, (v, U, u), dM)

    dv, dU, du = torch.zeros_like(v), torch.zeros_like(U), torch.zeros_like(u)
    scores, expected_scores = torch.zeros(B, d).double(), torch.zeros(B, d).double()
    for n, t in enumerate(scenario.tolist()):
        V = v[n].detach()
        dv[n, t], scores[n], dU_t, du_t = mutual_backward(dM[n], V, t, U[t].detach(), u[t].detach(), score, τ)
        dU[t] += dU_t
        du[t] += du_t
        if M > 1:
            # The scores' part alone: only the direction of α may depend on V_t.
            V_t = V[t].clone().requires_grad_()
            norm = V_t.norm() if V[t].norm() > EPSILON else EPSILON
            foreign = torch.arange(M) != t
            c = (V @ V_t) / (V.norm(dim=1).clamp(min=EPSILON) * norm)
            S = c[foreign].sum()
            ratios = c[foreign] / τ if score == "softmax" else c[foreign] / S if S.abs() >= 1e-6 else 0 * c[foreign]
            mix = torch.softmax(ratios, 0) @ V[foreign]
            g = sigmoid_of(V[t] @ U[t] + u[t]).detach()
            (expected_scores[n],) = torch.autograd.grad(g * mix, V_t, dM[n])
    assert_equal({"dV": dv, "dU": dU, "du": du}, {"dV": grad_v, "dU": grad_U, "du": grad_u})
    assert_equal({"scores": scores}, {"scores": expected_scores})
    if case == "random":
        assert scores.norm() > 0


def quantised(x, dim):
    """x as int8 with a scale holds it."""
    scale = x.abs().amax(dim, keepdim=True) / 127
    return (x / scale).round() * scale


def foreign_product(x, W, rounded):
    return quantised(x, -1) @ quantised(W, 0) if rounded else x @ W


def trunk_by_the_formulas(trunk, x_local, x_global, scenario, grad_own, grad_aux):
    """own, aux and every gradient of one MultiBranchMLP, row by row."""
    δ, score, τ = DELTA[trunk.activation], trunk.score, trunk.temperature
    rounded = trunk.foreign_dtype is not None
    p = trunk.params()
    W, b, Wa, ba, U, u = ([None if entry is None else entry.detach().double() for entry in entries] for entries in p)
    L, M = len(W), trunk.num_scenarios
    units = [layer for layer in range(L) if U[layer] is not None]
    last = max(units, default=-1)
    d = {
        name: [torch.zeros_like(entry) for entry in entries if entry is not None]
        for name, entries in zip(("W", "b", "Wa", "ba", "U", "u"), (W, b, Wa, ba, U, u), strict=True)
    }
    owns, auxs, dx_l, dx_g = [], [], torch.zeros_like(x_local), torch.zeros_like(x_global)
    for n, t in enumerate(scenario.tolist()):
        # Forward. streams: what each layer's mutual unit reads; inputs: what each layer of the own branch reads.
        A, Za, Zt, inputs, streams = [x_global[n]], [], [], [], []
        V = [x_local[n, k] if x_local.dim() == 3 else x_local[n] for k in range(M)]
        for layer in range(L):
            Za.append(A[-1] @ Wa[layer] + ba[layer])
            A.append(δ(Za[-1]))
            inputs.append(torch.cat([V[t], A[-1]]))
            Zt.append(inputs[-1] @ W[layer][t] + b[layer][t])
            branches = []
            for k in range(M):
                z = Zt[-1] if k == t else foreign_product(torch.cat([V[k], A[-1]]), W[layer][k], rounded) + b[layer][k]
                branches.append(δ(z) if k == t or layer <= last else torch.full_like(z, math.nan))
            V = branches
            streams.append(torch.stack(V))
            if U[layer] is not None:
                after = []
                for k in range(M):
                    if k == t or not rounded:
                        after.append(mutual_forward(streams[-1], k, U[layer], u[layer], score, τ))
                    else:
                        _, α = weights_of_row(streams[-1], k, score, τ)
                        g = sigmoid_of(foreign_product(V[k], U[layer][k], True) + u[layer][k])
                        after.append(V[k] + g * (α @ streams[-1]))
                V = after
        owns.append(V[t])
        auxs.append(A[L])

        dV, dA = grad_own[n], [torch.zeros_like(a) for a in A]
        dA[L] = grad_aux[n].clone()
        for layer in reversed(range(L)):
            if U[layer] is not None:
                dV, _, dU_t, du_t = mutual_backward(dV, streams[layer], t, U[layer][t], u[layer][t], score, τ)
                d["U"][units.index(layer)][t] += dU_t
                d["u"][units.index(layer)][t] += du_t
            dZ = dV * derivative(trunk.activation, Zt[layer])
            d["W"][layer][t] += torch.outer(inputs[layer], dZ)
            d["b"][layer][t] += dZ
            back = dZ @ W[layer][t].T
            width = len(inputs[layer]) - len(A[layer + 1])
            dV, dA[layer + 1] = back[:width], dA[layer + 1] + back[width:]
            dZa = dA[layer + 1] * derivative(trunk.activation, Za[layer])
            d["Wa"][layer] += torch.outer(A[layer], dZa)
            d["ba"][layer] += dZa
            dA[layer] = dA[layer] + dZa @ Wa[layer].T
        if x_local.dim() == 3:
            dx_l[n, t] = dV
        else:
            dx_l[n] = dV
        dx_g[n] = dA[0]
    gradients = {f"d{name}{index}": g for name, entries in d.items() for index, g in enumerate(entries)}
    return {"own": torch.stack(owns), "aux": torch.stack(auxs), "dx_l": dx_l, "dx_g": dx_g, **gradients}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mutual_layers": (), "activation": "relu"},
        {"mutual_layers": (1, 3), "score": "softmax", "activation": "gelu"},
        {"mutual_layers": (1, 2, 3), "gate": "scalar", "activation": "silu"},
        {"mutual_layers": (2,), "num_scenarios": 1},
        {"mutual_layers": (1, 2), "foreign_dtype": torch.int8, "activation": "leaky_relu"},
        {"mutual_layers": (2,), "views": True},
    ],
    ids=str,
)
def test_trunk(options):
    options = {"num_scenarios": 4, "activation": "tanh", **options}
    views, M, B = options.pop("views", False), options["num_scenarios"], 7
    layer = MultiBranchMLP(
        local_dim=5,
        global_dim=3,
        hidden_dims=(6, 5, 4),
        aux_dims=(4, 3, 2),
        backend="reference",
        dtype=torch.float64,
        **options,
    )
    x_local = (normal(B, M, 5) if views else normal(B, 5)).requires_grad_()
    x_global, scenario = normal(B, 3).requires_grad_(), torch.randint(0, max(M - 1, 1), (B,))  # one without a row
    grad_own, grad_aux = normal(B, 4), normal(B, 2)
    own, aux, _ = layer(x_local, x_global, scenario)
    params = [entry for entries in layer.params() for entry in entries if entry is not None]
    gradients = torch.autograd.grad((own, aux), (x_local, x_global, *params), (grad_own, grad_aux))
    found = trunk_by_the_formulas(layer, x_local.detach(), x_global.detach(), scenario, grad_own, grad_aux)
    names = [name for name in found if name not in ("own", "aux")]
    assert_equal(found, {"own": own, "aux": aux, **dict(zip(names, gradients, strict=True))})


def grouped_backward(dV, x, scenario, weights, biases, names):
    """dx and per layer dW, db of a grouped MLP."""
    dx, dW, db = torch.zeros_like(x), [torch.zeros_like(w) for w in weights], [torch.zeros_like(b) for b in biases]
    for n, t in enumerate(scenario.tolist()):
        V, Z = [x[n]], []
        for w, b, name in zip(weights, biases, names, strict=True):
            Z.append(V[-1] @ w[t] + b[t])
            V.append(DELTA[name](Z[-1]))
        gradient = dV[n]
        for layer in reversed(range(len(weights))):
            dZ = gradient * derivative(names[layer], Z[layer])
            dW[layer][t] += torch.outer(V[layer], dZ)
            db[layer][t] += dZ
            gradient = dZ @ weights[layer][t].T
        dx[n] = gradient
    return dx, dW, db


def named(dx, dW, db):
    return {
        "dx": dx,
        **{f"dW{layer}": gradient for layer, gradient in enumerate(dW)},
        **{f"db{layer}": gradient for layer, gradient in enumerate(db)},
    }


@pytest.mark.parametrize("operation", ["grouped_mlp", "branch_scores"])
def test_grouped_mlp_and_branch_scores(operation):
    M, B = 4, 9
    weights, biases = [normal(M, 5, 6), normal(M, 6, 2)], [normal(M, 6), normal(M, 2)]
    x, scenario = normal(B, 5).requires_grad_(), torch.randint(0, M - 1, (B,))
    leaves = [tensor.requires_grad_() for tensor in (*weights, *biases)]
    out = getattr(saml_kernels, operation)(
        x, scenario, weights, biases, activation="silu", output_activation="tanh", backend="reference"
    )
    gradient = torch.randn_like(out)
    dx, *params = torch.autograd.grad(out, (x, *leaves), gradient)
    own = gradient if operation == "grouped_mlp" else gradient[torch.arange(B), scenario]
    detached = [w.detach() for w in weights], [b.detach() for b in biases]
    found = grouped_backward(own, x.detach(), scenario, *detached, ["silu", "tanh"])
    assert_equal(named(*found), named(dx, params[:2], params[2:]))


def test_a_gate():
    M, B, γ = 4, 9, 1.6
    weights, biases = [normal(M, 5, 6), normal(M, 6, 2)], [normal(M, 6), normal(M, 2)]
    x, gated, scenario = normal(B, 5).requires_grad_(), normal(B, 2).requires_grad_(), torch.randint(0, M - 1, (B,))
    leaves = [tensor.requires_grad_() for tensor in (*weights, *biases)]
    options = {"activation": "silu", "backend": "reference"}
    out = saml_kernels.grouped_mlp(x, scenario, weights, biases, gated=gated, gate_scale=γ, **options)
    dout = torch.randn_like(out)
    dx, dgated, *params = torch.autograd.grad(out, (x, gated, *leaves), dout)

    layers = [w.detach() for w in weights], [b.detach() for b in biases]
    z = saml_kernels.grouped_mlp(x.detach(), scenario, *layers, output_activation="identity", **options)
    σ, y = sigmoid_of(z), gated.detach()
    assert_equal({"out": γ * σ * y, "dgated": γ * σ * dout}, {"out": out.detach(), "dgated": dgated})
    dZ = γ * σ * (1 - σ) * y * dout
    found = grouped_backward(dZ, x.detach(), scenario, *layers, ["silu", "identity"])
    assert_equal(named(*found), named(dx, params[:2], params[2:]))


def test_expert_outputs():
    K, B = 3, 7
    weights, biases = [normal(K, 5, 6), normal(K, 6, 2)], [normal(K, 6), normal(K, 2)]
    x = normal(B, 5).requires_grad_()
    leaves = [tensor.requires_grad_() for tensor in (*weights, *biases)]
    out = saml_kernels.expert_outputs(x, weights, biases, activation="tanh", backend="reference")
    gradient = torch.randn_like(out)
    dx, *params = torch.autograd.grad(out, (x, *leaves), gradient)
    layers = [w.detach() for w in weights], [b.detach() for b in biases]
    parts = [
        grouped_backward(gradient[:, k], x.detach(), torch.full((B,), k), *layers, ["tanh", "tanh"]) for k in range(K)
    ]
    # Each part's gradients of the other experts are zero.
    found = (
        sum(part[0] for part in parts),
        *(
            [sum(each) for each in zip(*lists, strict=True)]
            for lists in ([part[number] for part in parts] for number in (1, 2))
        ),
    )
    assert_equal(named(*found), named(dx, params[:2], params[2:]))


def test_star():
    layer = STARMLP(4, 5, (6, 3), activation="tanh", backend="reference", dtype=torch.float64)
    x, scenario = normal(9, 5).requires_grad_(), torch.randint(0, 4, (9,))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter))
    gradient = normal(9, 3)
    params = [*layer.weights, *layer.biases, *layer.shared_weights, *layer.shared_biases]
    expected = torch.autograd.grad(layer(x, scenario), (x, *params), gradient)
    W, b, W_s, b_s = ([p.detach() for p in params[i : i + 2]] for i in range(0, 8, 2))
    stars = [w * s for w, s in zip(W, W_s, strict=True)], [w + s for w, s in zip(b, b_s, strict=True)]
    dx, dW, db = grouped_backward(gradient, x.detach(), scenario, *stars, ["tanh", "tanh"])
    found = [dx]
    found += [star * s for star, s in zip(dW, W_s, strict=True)]
    found += db
    found += [(star * w).sum(0) for star, w in zip(dW, W, strict=True)]
    found += [star.sum(0) for star in db]
    assert_equal(dict(enumerate(found)), dict(enumerate(expected)))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("combine", ["product", "sum"])
def test_partitioned_norm(combine, training):
    M, d = 4, 5
    # Scenario 2 has one row, scenario 3 none.
    scenario = torch.tensor([0, 1, 0, 1, 1, 2, 0])
    layer = PartitionedNorm(M, d, combine=combine, dtype=torch.float64).train(training)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter))
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2)
    moving_mean, moving_variance = layer.running_mean.clone(), layer.running_var.clone()
    z, dy = normal(7, d).requires_grad_(), normal(7, d)
    params = [layer.weight, layer.shared_weight, layer.bias, layer.shared_bias]
    expected = torch.autograd.grad(layer(z, scenario), (z, *params), dy)

    γ_t, γ, β_t, _ = (p.detach() for p in params)
    κ = γ * γ_t if combine == "product" else γ + γ_t
    z = z.detach()
    dz, dκ, dβ_t = torch.zeros_like(z), torch.zeros_like(κ), torch.zeros_like(β_t)
    for t in range(M):
        rows = scenario == t
        batch = training and int(rows.sum()) >= 2
        μ = z[rows].mean(0) if batch else moving_mean[t]
        root = torch.sqrt((z[rows].var(0, unbiased=False) if batch else moving_variance[t]) + layer.eps)
        z_hat = (z[rows] - μ) / root
        dz_hat = dy[rows] * κ[t]
        dz[rows] = (dz_hat - dz_hat.mean(0) - z_hat * (dz_hat * z_hat).mean(0)) / root if batch else dz_hat / root
        dκ[t] = (dy[rows] * z_hat).sum(0)
        dβ_t[t] = dy[rows].sum(0)
    dγ_t, dγ = (dκ * γ, (dκ * γ_t).sum(0)) if combine == "product" else (dκ, dκ.sum(0))
    assert_equal(dict(enumerate((dz, dγ_t, dγ, dβ_t, dβ_t.sum(0)))), dict(enumerate(expected)))


def test_hmoe():
    M, B = 4, 9
    layer = ScoreMixture(M, 5, (6,), activation="tanh", backend="reference", dtype=torch.float64)
    x, scenario, dlogit = normal(B, 5).requires_grad_(), torch.randint(0, M, (B,)), normal(B)
    networks, (W_w,), (b_w,) = layer.networks, layer.weight_networks.weights, layer.weight_networks.biases
    params = [*networks.weights, *networks.biases, W_w, b_w]
    expected = torch.autograd.grad(layer(x, scenario), (x, *params), dlogit)

    rows, x = torch.arange(B), x.detach()
    weights, biases = [w.detach() for w in networks.weights], [b.detach() for b in networks.biases]
    S = sigmoid_of(layer.logits(x, scenario).detach())
    W_w, b_w = W_w.detach(), b_w.detach()
    W = torch.softmax(torch.einsum("bd,bdj->bj", x, W_w[scenario]) + b_w[scenario], 1)
    H = (W * S).sum(1)
    dH = dlogit / (H * (1 - H))
    S_t, W_t = S[rows, scenario], W[rows, scenario]
    ds_t = dH * W_t * S_t * (1 - S_t)
    dv = dH.unsqueeze(1) * W * (S - H.unsqueeze(1))
    dx, dW, db = grouped_backward(ds_t.unsqueeze(1), x, scenario, weights, biases, ["tanh", "identity"])
    dx_w, dW_w, db_w = grouped_backward(dv, x, scenario, [W_w], [b_w], ["identity"])
    found = [dx + dx_w, *dW, *db, *dW_w, *db_w]
    assert_equal(dict(enumerate(found)), dict(enumerate(expected)))


def test_experts_under_a_gate():
    layer = MixtureOfExperts(3, 5, (4,), activation="tanh", dtype=torch.float64)
    x, dout = normal(6, 5), normal(6, 4)
    E = torch.stack([torch.tanh(x @ w + b) for w, b in zip(layer.weights[0], layer.biases[0], strict=True)]).detach()
    v = layer.gate(x).detach().requires_grad_()
    experts = E.clone().requires_grad_()
    G = torch.softmax(v, 1)
    assert_equal({"out": torch.einsum("bk,kbd->bd", G, E)}, {"out": layer(x)})
    dE_expected, dv_expected = torch.autograd.grad(torch.einsum("bk,kbd->bd", G, experts), (experts, v), dout)
    G = G.detach()
    q = torch.einsum("bd,kbd->bk", dout, E)
    dv = G * (q - (G * q).sum(1, keepdim=True))
    dE = G.T.unsqueeze(2) * dout
    assert_equal({"dE": dE, "dv": dv}, {"dE": dE_expected, "dv": dv_expected})


def test_heads_and_losses():
    M, B, d_L, a_L, λ = 3, 8, 5, 4, 0.7
    V, A, y, scenario = normal(B, d_L), normal(B, a_L), torch.randint(0, 2, (B,)).double(), torch.randint(0, M, (B,))
    w, c, w_a, c_a = normal(M, d_L + 1), normal(M), normal(a_L), normal(1)
    leaves = [tensor.requires_grad_() for tensor in (V, A, w, c, w_a, c_a)]
    aux_logit = A @ w_a + c_a
    logit = (torch.cat([V, aux_logit.unsqueeze(1)], 1) * w[scenario]).sum(1) + c[scenario]
    bce = F.binary_cross_entropy_with_logits
    expected = torch.autograd.grad(bce(logit, y) + λ * bce(aux_logit, y), leaves)

    V, A, w, c, w_a, c_a, logit, aux_logit = (x.detach() for x in (*leaves, logit, aux_logit))
    w_v, w_x = w[scenario, :d_L], w[scenario, d_L]
    dlogit = (sigmoid_of(logit) - y) / B
    daux_logit = λ * (sigmoid_of(aux_logit) - y) / B + dlogit * w_x
    read = torch.cat([V, aux_logit.unsqueeze(1)], 1)
    dw = torch.zeros_like(w).index_add(0, scenario, read * dlogit.unsqueeze(1))
    dc = torch.zeros_like(c).index_add(0, scenario, dlogit)
    dw_a, dc_a = A.T @ daux_logit, daux_logit.sum().unsqueeze(0)
    dV, dA = dlogit.unsqueeze(1) * w_v, torch.outer(daux_logit, w_a)
    assert_equal(dict(enumerate((dV, dA, dw, dc, dw_a, dc_a))), dict(enumerate(expected)))
