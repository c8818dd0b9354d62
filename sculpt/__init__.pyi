"""The table of contents: what sculpt offers, and where it is. Type checkers read it as it is, and names are imported when they are first used."""

# base models
from sculpt.hub import load as load
from sculpt.diffusion.diffusers.adapter import Diffusion as Diffusion
from sculpt.diffusion.energy import EnergyModel as EnergyModel
from sculpt.gflownet.model import GFlowNet as GFlowNet
from sculpt.tokens.model import Tokens as Tokens

# what a family of one's own fills
from sculpt.model import BaseModel as BaseModel
from sculpt.model import Steppable as Steppable
from sculpt.actions.model import ActionModel as ActionModel

# compositions
from sculpt.composition import Composition as Composition
from sculpt.composition import mixture as mixture
from sculpt.composition import harmonic_mean as harmonic_mean
from sculpt.composition import contrast as contrast
from sculpt.composition import posterior as posterior
from sculpt.composition import product as product
from sculpt.composition import power_mean as power_mean
from sculpt.factor import Factor as Factor

# roads
from sculpt.roads import Road as Road
from sculpt.roads import Guided as Guided
from sculpt.roads import Tracked as Tracked
from sculpt.roads import Rejection as Rejection

# MCMC at every noise level, for tracked densities
from sculpt.diffusion.correctors import ULA as ULA
from sculpt.diffusion.correctors import MALA as MALA
from sculpt.diffusion.correctors import HMC as HMC

# the classifier
from sculpt.classifier.fit import fit as fit
from sculpt.classifier.fit import Descent as Descent
from sculpt.classifier.field import fit_field as fit_field
from sculpt.classifier.heads import Classifier as Classifier

# compositions as checkpoints
from sculpt.distillation import distill as distill

# results
from sculpt.samples import Samples as Samples
from sculpt.diagnostics import Diagnostics as Diagnostics
from sculpt.diagnostics import Verdict as Verdict

# large jobs: shards that survive a kill
from sculpt.library import generate as generate
from sculpt.library import Library as Library

# looking at them
from sculpt.overlaps import overlap as overlap
from sculpt.apps.explorer import explore as explore
from sculpt.gflownet import exact as exact

__version__: str
