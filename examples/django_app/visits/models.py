from django.db import models


class Upload(models.Model):
    """What is remembered of an uploaded file; the bytes themselves are not kept."""

    name = models.CharField(max_length=255)
    size = models.BigIntegerField(help_text="bytes")
    sha256 = models.CharField(max_length=64)
    created = models.DateTimeField(auto_now_add=True)

    class Meta:
        ordering = ("-created",)

    def __str__(self) -> str:
        return f"{self.name} ({self.size} bytes)"
