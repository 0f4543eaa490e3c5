"""Explanations: of one decision (gradients, relevance, masks, surrogates, examples), of a model, and their trials.

The functions below are those that chapters 13 and 14 are about; what they are made of stands in the modules.
"""

from .activation import cam, grad_cam, guided_grad_cam
from .atlas import activation_atlas, dissect, facets, neuron_groups
from .counterfactuals import Counterfactual, counterfactual, linear_counterfactual
from .examples import influential, prototypes
from .fooling import fool_input, scaffold
from .gradients import (
    gradient_x_input,
    guided_backprop,
    integrated_gradients,
    saliency,
    sensitivity,
    smoothgrad,
)
from .influence import influence, modification, poison, regression, relabelling, removal
from .latent import beta_vae, mutual_information_gap
from .lime import Anchor, Surrogate, anchor, kernel_shap, lime, lime_table, shapley
from .masks import extremal_perturbation, occlusion, rise
from .maximization import activation_maximization, deep_dream
from .relevance import lrp, lrp_layers
from .sanity import parameter_randomisation, rank_correlation, ssim
from .scores import Score, deletion, insertion, mass_accuracy, pointing_game
from .uncertainty import Uncertainty, uncertainty

__all__ = [
    "Anchor",
    "Counterfactual",
    "Score",
    "Surrogate",
    "Uncertainty",
    "activation_atlas",
    "activation_maximization",
    "anchor",
    "beta_vae",
    "cam",
    "counterfactual",
    "deep_dream",
    "deletion",
    "dissect",
    "extremal_perturbation",
    "facets",
    "fool_input",
    "grad_cam",
    "gradient_x_input",
    "guided_backprop",
    "guided_grad_cam",
    "influence",
    "influential",
    "insertion",
    "integrated_gradients",
    "kernel_shap",
    "lime",
    "lime_table",
    "linear_counterfactual",
    "lrp",
    "lrp_layers",
    "mass_accuracy",
    "modification",
    "mutual_information_gap",
    "neuron_groups",
    "occlusion",
    "parameter_randomisation",
    "pointing_game",
    "poison",
    "prototypes",
    "rank_correlation",
    "regression",
    "relabelling",
    "removal",
    "rise",
    "saliency",
    "scaffold",
    "sensitivity",
    "shapley",
    "smoothgrad",
    "ssim",
    "uncertainty",
]
