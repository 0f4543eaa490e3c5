"""Poisoning: an attacker who writes a part of the training data."""

from .backdoors import Planted, adversarial_embedding, attack_success, backdoor, trojan
from .bounds import Bound, certified_bound
from .clean_label import CleanLabel, feature_collision, gradient_matching, meta_poison
from .cleanse import Cleansed, anomaly_index, neural_cleanse, shipped_table, unlearning
from .federated import Attacker, federated_average, federated_backdoor, split_clients
from .flips import flip_labels
from .gradient import gradient_attack
from .inspection import Clusters, activation_clustering, fine_pruning, latents, spectral_signatures, suspects
from .kkt import Fit, Poisoned, SingularKKT, fit, implicit_gradient, implicit_jacobian, kkt_attack, naive_attack
from .label_noise import co_teaching, forward_loss, noise_svm, noisy_labels, transition, unbiased_loss
from .learners import Learner, logistic, ridge, scores, smooth_svm, svm
from .referee import best_flips, best_responses
from .sets import Sanitizer, sanitizer
from .triggers import Trigger, bars_trigger, blended_trigger, pattern_trigger, pixel_trigger
from .unlearnable import Protected, unlearnable

__all__ = [
    "Attacker",
    "Bound",
    "CleanLabel",
    "Cleansed",
    "Clusters",
    "Fit",
    "Learner",
    "Planted",
    "Poisoned",
    "Protected",
    "Sanitizer",
    "SingularKKT",
    "Trigger",
    "activation_clustering",
    "adversarial_embedding",
    "anomaly_index",
    "attack_success",
    "backdoor",
    "bars_trigger",
    "best_flips",
    "best_responses",
    "blended_trigger",
    "certified_bound",
    "co_teaching",
    "feature_collision",
    "federated_average",
    "federated_backdoor",
    "fine_pruning",
    "fit",
    "flip_labels",
    "forward_loss",
    "gradient_attack",
    "gradient_matching",
    "implicit_gradient",
    "implicit_jacobian",
    "kkt_attack",
    "latents",
    "logistic",
    "meta_poison",
    "naive_attack",
    "neural_cleanse",
    "noise_svm",
    "noisy_labels",
    "pattern_trigger",
    "pixel_trigger",
    "ridge",
    "sanitizer",
    "scores",
    "shipped_table",
    "smooth_svm",
    "spectral_signatures",
    "split_clients",
    "suspects",
    "svm",
    "transition",
    "trojan",
    "unbiased_loss",
    "unlearnable",
    "unlearning",
]
