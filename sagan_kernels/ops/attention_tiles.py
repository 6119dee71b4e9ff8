"""placeholder until merged"""
import torch


def _p(q, k):
    return torch.softmax(q @ k.mT, -1)


def forward(q, k, v):
    return (_p(q, k) @ v).contiguous()


def backward(q, k, v, g):
    p = _p(q, k)
    ds = g @ v.mT
    ds = p * (ds - (p * ds).sum(-1, keepdim=True))
    return (ds @ k).contiguous(), (ds.mT @ q).contiguous(), (p.mT @ g).contiguous()


def double_backward(q, k, v, g, a, b, c):
    p = _p(q, k)
    t = a @ k.mT + q @ b.mT
    t = t - (p * t).sum(-1, keepdim=True)
    d = g @ v.mT
    d = d - (p * d).sum(-1, keepdim=True)
    x = p * (g @ c.mT + t * d)
    x = x - p * x.sum(-1, keepdim=True)
    d = d * p
    pt = p * t
    return tuple(z.contiguous() for z in (x @ k + d @ b, x.mT @ q + d.mT @ a, pt.mT @ g, pt @ v + p @ c))


def tangent(q, k, v, a, b, c):
    p = _p(q, k)
    t = a @ k.mT + q @ b.mT
    t = t - (p * t).sum(-1, keepdim=True)
    return ((p * t) @ v + p @ c).contiguous()


def transposed(q, k, v):
    return (_p(k, q).mT @ v).contiguous()


def stores_map(B, L, S, d):
    return B * L * S <= 2**21
