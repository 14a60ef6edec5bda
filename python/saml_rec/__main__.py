"""python -m saml_rec"""

from saml_rec.cli import main

main(prog_name="saml-rec")
