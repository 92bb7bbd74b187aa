# docker build -t pujax .
# docker run --rm --user "$(id -u):$(id -g)" -v "$PWD:/work" -w /work pujax train +experiment=quickstart
# On a GPU: add `RUN .venv/bin/pip install '.[cuda]'` after `make setup`, and run with --gpus all.
# Tried, by buildah, on Debian 12 with its Python 3.11 in the place of this image: the smoke
# experiment, as root and as a user without a home. The GPU's line was not.
FROM python:3.11
WORKDIR /pujax
COPY . .
RUN make setup
# Whoever it runs as may have no home, and matplotlib and compiled programs want one.
ENV PATH=/pujax/.venv/bin:$PATH HOME=/tmp
ENTRYPOINT ["pujax"]
CMD ["--help"]
