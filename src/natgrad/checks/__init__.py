"""What users give, checked: values, parameters of a model. And how they are warned."""
