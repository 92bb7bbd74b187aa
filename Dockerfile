# docker build -t pujax . && docker run --rm -v "$PWD:/work" -w /work pujax train +experiment=quickstart
# On a GPU: add `RUN .venv/bin/pip install '.[cuda]'` after `make setup`, and run with --gpus all.
# Its one step is what the tests run after on a clean clone; the image itself was never built by us.
FROM python:3.11
WORKDIR /pujax
COPY . .
RUN make setup
ENV PATH=/pujax/.venv/bin:$PATH
ENTRYPOINT ["pujax"]
CMD ["--help"]
