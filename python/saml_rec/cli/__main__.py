"""python -m saml_rec.cli"""

from saml_rec.cli import main

main(prog_name="saml-rec")
