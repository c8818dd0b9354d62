r"""Other people's samplers of compositions, written from their papers, on one interface and one solver.

====================  ==========================================================================================
file                  whose
====================  ==========================================================================================
:mod:`.joint`         nobody's: one prompt that says it all
:mod:`.averaged`      Composable Diffusion (Liu et al., 2022): AND and NOT by sums of differences of scores
:mod:`.experts`       products of experts: scores that are added up (Hinton, 2002; Du et al., 2023)
:mod:`.superdiff`     SuperDiff (Skreta et al., 2025): AND by equal densities, OR by the mixture's score
:mod:`.dombi`         Dombi's logic (Blohm and Garg, 2026): nested power means, each particle by itself
:mod:`.fkc`           Feynman-Kac correctors (Skreta et al., 2025): weights and selection for products
:mod:`.complift`      CompLift (Yu and Gao, 2025): candidates are accepted by differences of denoising errors
====================  ==========================================================================================

Each is a function ``rival(models, n, *, steps, generator, ...)`` that returns n samples (CompLift: those accepted), float64.
"""
