# docker build -t pujax . && docker run --rm -v "$PWD:/work" -w /work pujax train +experiment=quickstart
# On a GPU: add `RUN .venv/bin/pip install '.[cuda]'` after `make setup`, and run with --gpus all.
FROM python:3.11
WORKDIR /pujax
COPY . .
RUN make setup
ENV PATH=/pujax/.venv/bin:$PATH
ENTRYPOINT ["pujax"]
CMD ["--help"]
