# The README's install command on a slim Python; the image erases from the embedded pipeline at once:
#   docker build -t esd_peft . && docker run --rm -v "$PWD:/work" esd_peft --concept circle
FROM python:3.11-slim

# Triton's kernels are compiled on first use
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*

WORKDIR /esd_peft
COPY . .
RUN pip install torch==2.13.0 && pip install .

WORKDIR /work
ENTRYPOINT ["python", "-m", "esd_peft.erase"]
