"""Class activation maps: the logit shared out over places, Grad-CAM beside it, Captum."""

import pytest
import torch
from torch import nn

from tmlcourse import data, models, pretrained
from tmlcourse.interpret.activation import cam, grad_cam, guided_grad_cam
from tmlcourse.interpret.common import last_convolution
from tmlcourse.interpret.gradients import guided_backprop


@pytest.fixture(scope="module")
def net():
    return pretrained.load("shapes-standard")


@pytest.fixture(scope="module")
def shapes():
    return data.shapes(6)


def test_the_mean_of_the_map_and_the_bias_are_the_logit(net, shapes):
    for target in (None, 5, shapes.y):
        heat = cam(net, shapes.x, target, upsample=False)
        with torch.no_grad():
            z = net(shapes.x)
        c = z.argmax(1) if target is None else torch.as_tensor(target).expand(6)
        torch.testing.assert_close(heat.mean((1, 2, 3)) + net[-1].bias[c].detach(), z.gather(1, c[:, None])[:, 0])


def test_grad_cam_of_the_last_features_is_the_map_over_the_places(net, shapes):
    heat = cam(net, shapes.x, shapes.y, upsample=False)
    after_relu = str(int(last_convolution(net)) + 1)
    other = grad_cam(net, shapes.x, shapes.y, layer=after_relu, relu=False, upsample=False)
    torch.testing.assert_close(other * heat[0].numel(), heat)
    cut = grad_cam(net, shapes.x, shapes.y, layer=after_relu, upsample=False)
    torch.testing.assert_close(cut * heat[0].numel(), heat.clamp(min=0))


def test_grad_cam_by_hand(net, shapes):
    """alpha_k by finite differences: the logit's change when map k rises everywhere by a little."""
    head, tail = pretrained.load("shapes-standard").double()[:6], pretrained.load("shapes-standard").double()[6:]
    x = shapes.x[:2].double()
    with torch.no_grad():
        features = head(x)
        rows = []
        for k in range(features.shape[1]):
            step = torch.zeros_like(features)
            step[:, k] = 1e-7
            rows.append((tail(features + step) - tail(features - step))[:, 4] / 2e-7 / features[0, 0].numel())
        heat = (torch.stack(rows, 1)[:, :, None, None] * features).sum(1, keepdim=True)
    found = grad_cam(nn.Sequential(*head, *tail), x, 4, layer="5", relu=False, upsample=False)
    torch.testing.assert_close(found, heat, atol=1e-4, rtol=1e-4)


def test_captum_agrees(net, shapes):
    captum = pytest.importorskip("captum.attr")
    layer = net.get_submodule(last_convolution(net))
    theirs = captum.LayerGradCam(net, layer).attribute(shapes.x, target=shapes.y, relu_attributions=True).detach()
    ours = grad_cam(net, shapes.x, shapes.y, upsample=False)
    assert (ours - theirs).abs().max() < 1e-5 * theirs.max()
    theirs = captum.GuidedGradCam(net, layer).attribute(shapes.x, target=shapes.y, interpolate_mode="bilinear").detach()
    assert (guided_grad_cam(net, shapes.x, shapes.y) - theirs).abs().max() < 1e-5 * theirs.abs().max()


def test_maps_have_the_size_of_the_image_and_the_model_is_left_alone(net, shapes):
    x = torch.rand(3, 3, 20, 28)
    assert cam(net, x).shape == grad_cam(net, x).shape == (3, 1, 20, 28)
    assert cam(net, x, upsample=False).shape == grad_cam(net, x, upsample=False).shape == (3, 1, 5, 7)
    torch.testing.assert_close(grad_cam(net, x, 1, batch_size=2), grad_cam(net, x, 1), atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(guided_grad_cam(net, x, 1), guided_backprop(net, x, 1) * grad_cam(net, x, 1))
    assert (grad_cam(net, x) >= 0).all() and not x.requires_grad
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    assert grad_cam(models.resnet(depth=8, width=4).double(), x.double()).dtype == torch.float64
    with pytest.raises(ValueError, match="target"):
        grad_cam(net, x, 9)
    assert not any(layer._forward_hooks for layer in net.modules())


def test_layers_in_place_and_frozen_weights_change_nothing(shapes):
    plain, changed = pretrained.load("shapes-standard"), pretrained.load("shapes-standard")
    for layer in changed:
        if isinstance(layer, nn.ReLU):
            layer.inplace = True
    changed.requires_grad_(False)
    torch.testing.assert_close(grad_cam(changed, shapes.x, 2), grad_cam(plain, shapes.x, 2))


def test_bad_layers_and_models_are_named(net, shapes):
    x = shapes.x
    for call, error, message in [
        (lambda: grad_cam(net, x, layer="conv9"), ValueError, "layer: got 'conv9', want one of this model's layers: 0"),
        (lambda: grad_cam(net, x, layer="16"), ValueError, "want one with places"),
        (lambda: grad_cam(models.mlp((3, 32, 32)), x), ValueError, "model: got no convolution in it"),
        (lambda: cam(models.mlp((3, 32, 32)), x), ValueError, "model: got no convolution in it"),
        (lambda: cam(models.small_cnn((3, 32, 32)), x), ValueError, "ends in Linear, ReLU, Linear.*grad_cam"),
        (lambda: cam(net, x, 8), ValueError, "target: got label 8"),
        (lambda: grad_cam(lambda x: net(x), x, 0), ValueError, "no convolution"),
        (lambda: grad_cam(lambda x: net(x), x, 0, layer="0"), TypeError, "want an nn.Module"),
    ]:
        with pytest.raises(error, match=message):
            call()
