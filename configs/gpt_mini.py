from jaxgpt.config import Config

config = Config(name="gpt_mini")
