# A worker in a container: for compose.yaml, and for `fleet k8s manifest`.
#
#   docker build --tag rq-fleet:0.1.0 .
#
# What jobs need is added upon it: FROM rq-fleet:0.1.0, USER root, RUN ..., USER 10001:10001.
FROM python:3.13.1-slim-bookworm

# Jobs are other people's programs: none of them is root. By number, so that Kubernetes sees that.
RUN groupadd --gid 10001 fleet && useradd --create-home --uid 10001 --gid fleet fleet

WORKDIR /opt/rq-fleet
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY broker broker
COPY fleet fleet
COPY cli cli
RUN pip install --no-cache-dir --constraint constraints.txt .

USER 10001:10001
WORKDIR /home/fleet
ENTRYPOINT ["fleet", "worker"]
CMD ["--queues", "default"]
