"""The released TensorFlow code at 128 px, as functions of its variables: float64 arrays by their names there.

Maps are (B, H, W, C), kernels (H, W, C, K), and every spectral norm takes one iteration from the stored u, (1, K).
"""

import numpy as np
import torch
import torch.nn.functional as F

G_WIDTHS, D_WIDTHS = (16, 16, 8, 4, 2, 1), (1, 2, 4, 8, 16, 16)


def variables(rng, gf=4, df=4, classes=3, z=6):
    """Both networks of `generator_test` and `discriminator_test`: attention at 32 px."""
    v = {}

    def layer(name, *shape, weight="w", bias="biases", outputs=None):
        v[f"model/{name}/{weight}"] = rng.standard_normal(shape) * (1 / np.sqrt(np.prod(shape[:-1])))
        v[f"model/{name}/u"] = rng.standard_normal((1, outputs or shape[-1]))
        if bias:
            v[f"model/{name}/{bias}"] = rng.standard_normal(shape[-1]) * 0.1

    def attention(name, C):
        for part, shape in {
            "theta": (C, C // 8),
            "phi": (C, C // 8),
            "g": (C, C // 2),
            "attn": (C // 2, C),
        }.items():
            layer(f"{name}/sn_conv_{part}", 1, 1, *shape, bias=None)
        v[f"model/{name}/sigma_ratio"] = np.array(0.7)

    widths = [gf * w for w in G_WIDTHS]
    layer("g_snh0", z, widths[0] * 16, weight="Matrix", bias="bias")
    for i in range(1, 6):
        for j, C in enumerate((widths[i - 1], widths[i])):
            norm = f"model/g_block{i}/cbn_{j}"
            v[f"{norm}/gamma"] = 1 + rng.standard_normal((classes, C)) * 0.7
            v[f"{norm}/beta"] = rng.standard_normal((classes, C)) * 0.3
            v[f"{norm}/mean"] = rng.standard_normal((1, 1, 1, C)) * 0.2
            v[f"{norm}/var"] = rng.uniform(0.5, 2, (1, 1, 1, C))
        for j, (side, C) in enumerate([(3, widths[i - 1]), (3, widths[i]), (1, widths[i - 1])]):
            layer(f"g_block{i}/snconv{j + 1}", side, side, C, widths[i])
    attention("g_non_local", widths[3])
    for name in ("gamma", "beta", "moving_mean"):
        v[f"model/g_bn/{name}"] = rng.standard_normal(gf)
    v["model/g_bn/moving_variance"] = rng.uniform(0.5, 2, gf)
    layer("g_snconv_last", 3, 3, gf, 3)

    widths = [df * w for w in D_WIDTHS]
    for i, name in enumerate(["d_optimized_block1", *(f"d_block{i}" for i in range(2, 7))]):
        C = [3, *widths][i]
        for j, (side, C_in) in enumerate([(3, C), (3, widths[i]), (1, C)][: 2 if i == 5 else 3]):
            layer(f"{name}/sn_conv{j + 1}", side, side, C_in, widths[i])
    attention("d_non_local", widths[1])
    layer("d_sn_linear", widths[-1], 1, weight="Matrix", bias="bias")
    layer("d_embedding", classes, widths[-1], weight="embedding_map", bias=None, outputs=classes)
    return v


def generator(v, z, label):
    h = (z @ _weight(v, "g_snh0/Matrix") + _get(v, "g_snh0/bias")).reshape(len(z), 4, 4, -1)
    for i in range(1, 6):
        name = f"g_block{i}"
        x = torch.relu(_class_norm(v, f"{name}/cbn_0", h, label))
        x = _conv(v, f"{name}/snconv1", _double(x))
        x = _conv(v, f"{name}/snconv2", torch.relu(_class_norm(v, f"{name}/cbn_1", x, label)))
        h = x + _conv(v, f"{name}/snconv3", _double(h))
        h = _attention(v, "g_non_local", h) if i == 3 else h
    scale = _get(v, "g_bn/gamma") / torch.sqrt(_get(v, "g_bn/moving_variance") + 1e-5)
    h = torch.relu((h - _get(v, "g_bn/moving_mean")) * scale + _get(v, "g_bn/beta"))
    return torch.tanh(_conv(v, "g_snconv_last", h)).permute(0, 3, 1, 2)


def discriminator(v, image, label):
    h = image.permute(0, 2, 3, 1)
    for i, name in enumerate(["d_optimized_block1", *(f"d_block{i}" for i in range(2, 7))]):
        x = _conv(v, f"{name}/sn_conv1", torch.relu(h) if i else h)
        x = _conv(v, f"{name}/sn_conv2", torch.relu(x))
        if i < 5:
            x, h = _halve(x), _halve(_conv(v, f"{name}/sn_conv3", h))
        h = x + h
        h = _attention(v, "d_non_local", h) if i == 1 else h
    h = torch.relu(h).sum((1, 2))
    table = _get(v, "d_embedding/embedding_map")
    table = _normed(table.T, _get(v, "d_embedding/u")).T
    out = h @ _weight(v, "d_sn_linear/Matrix") + _get(v, "d_sn_linear/bias")
    return (out + (h * table[label]).sum(1, keepdim=True)).squeeze(1)


def _get(v, name):
    return torch.from_numpy(np.asarray(v[f"model/{name}"]))


def _normed(weight, u):
    W = weight.reshape(-1, weight.shape[-1])
    right = u @ W.T
    right = right / (right.norm() + 1e-12)
    left = right @ W
    left = left / (left.norm() + 1e-12)
    return weight / (right @ W @ left.T).squeeze()


def _weight(v, name):
    return _normed(_get(v, name), _get(v, f"{name.rsplit('/', 1)[0]}/u"))


def _conv(v, name, x):
    y = F.conv2d(x.permute(0, 3, 1, 2), _weight(v, f"{name}/w").permute(3, 2, 0, 1), padding="same")
    y = y.permute(0, 2, 3, 1)
    return y + _get(v, f"{name}/biases") if f"model/{name}/biases" in v else y


def _class_norm(v, name, x, label):
    gain, bias = (_get(v, f"{name}/{part}")[label][:, None, None] for part in ("gamma", "beta"))
    return (x - _get(v, f"{name}/mean")) / torch.sqrt(_get(v, f"{name}/var") + 1e-5) * gain + bias


def _attention(v, name, x):
    B, H, W, C = x.shape
    theta = _conv(v, f"{name}/sn_conv_theta", x).reshape(B, H * W, C // 8)
    phi, g = (
        _pool(_conv(v, f"{name}/sn_conv_{part}", x)).reshape(B, H * W // 4, -1) for part in ("phi", "g")
    )
    attended = torch.softmax(theta @ phi.mT, dim=-1) @ g
    return x + _get(v, f"{name}/sigma_ratio") * _conv(
        v, f"{name}/sn_conv_attn", attended.reshape(B, H, W, -1)
    )


def _pool(x):
    return F.max_pool2d(x.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)


def _halve(x):
    return (x[:, ::2, ::2] + x[:, 1::2, ::2] + x[:, ::2, 1::2] + x[:, 1::2, 1::2]) / 4


def _double(x):
    return x.repeat_interleave(2, 1).repeat_interleave(2, 2)
