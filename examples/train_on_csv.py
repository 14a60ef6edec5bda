"""SAML trained on a table of your own from Python, and its metrics by scenario.

    python examples/train_on_csv.py --data clicks.csv --schema schema.toml --out runs/mine
    python examples/train_on_csv.py --out runs/example                     # without --data: writes an example first

The same as the command `saml-rec train`; use this where the training is part of a program.
"""

import argparse
from pathlib import Path

from saml_rec import load_schema
from saml_rec.console import total_name
from saml_rec.data import prepare, write_synthetic
from saml_rec.training import TrainOptions, train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="CSV or Parquet, one row a sample")
    parser.add_argument("--schema", type=Path, help="TOML: which column is what; docs/data.md has every key")
    parser.add_argument("--out", type=Path, required=True, help="the run directory")
    parser.add_argument("--model", default="saml")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if (arguments.data is None) != (arguments.schema is None):
        parser.error("--data and --schema belong together")

    data_path, schema_path = arguments.data, arguments.schema
    if data_path is None:
        data_path, schema_path, _ = write_synthetic(arguments.out.with_name(f"{arguments.out.name}-data"), rows=4000)
        print(f"wrote {data_path} and {schema_path}")

    schema = load_schema(schema_path)
    data = prepare(data_path, schema, seed=arguments.seed)
    options = TrainOptions(
        model=arguments.model,
        epochs=arguments.epochs,
        batch_size=128,
        learning_rate=3e-3,
        seed=arguments.seed,
        model_options={"hidden_dims": (32, 16)},
    )
    metrics = train(data, schema, options, arguments.out, data_path=data_path).metrics

    print(f"{'scenario':12} {'AUC':>7} {'log loss':>9} {'rows':>6}")
    for name, scores in [*metrics["scenarios"].items(), (total_name(metrics["scenarios"]), metrics["overall"])]:
        auc = "-" if scores["auc"] is None else f"{scores['auc']:.4f}"  # one class only: no AUC
        loss = "-" if scores["logloss"] is None else f"{scores['logloss']:.4f}"
        print(f"{name:12} {auc:>7} {loss:>9} {scores['rows']:6}")


if __name__ == "__main__":
    main()
