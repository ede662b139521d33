"""The four steps of the pipeline as commands: what Argo's and Kubeflow's pods run. No Dagster, no torch.

`python -m cifar_assets.pipeline_steps --help` lists them. They hold no rules of their own: data is checked by
`cifar_assets.dataset`, models by `cifar_assets.model_package` and `cifar_assets.gate`.
"""
