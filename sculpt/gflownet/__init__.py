"""The GFlowNet family: policies on a shared DAG, stepped through torchgfn environments."""
