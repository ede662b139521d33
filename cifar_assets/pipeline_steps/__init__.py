"""The four steps of the pipeline as commands, run by the pods of Argo and Kubeflow. No Dagster, no torch.

`python -m cifar_assets.pipeline_steps --help` lists them. The steps define no rules: data is checked by
`cifar_assets.dataset`, models by `cifar_assets.model_package` and `cifar_assets.gate`.
"""
